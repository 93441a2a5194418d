mod common;
use common::fastest;
use half::bf16;
use hydra_kernels::*;
fn main(){
    let (a,b)=common::peaks(); println!("peak {:.1} {:.1}", a*1e-9, b*1e-9);
    let isa = Bf16Isa::detect();
    for (m,n,k) in [(32,32,576),(32,576,576),(256,576,576),(256,1536,576),(256,192,576),(256,576,1536),(512,512,4096),(512,4096,4096)] {
        let x: Vec<f32> = (0..m*k).map(|i| (i%13) as f32 * 0.1).collect();
        let xb: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        let w: Vec<f32> = (0..n*k).map(|i| (i%7) as f32 * 0.1).collect();
        let mut pv = vec![bf16::ZERO; panels_len::<bf16>(isa,k,n)+32]; let off = pv.as_ptr().align_offset(64); let len=panels_len::<bf16>(isa,k,n); let mut p = &mut pv[off..off+len]; let off_=off;
        let src = || Source::Dense{data: Values::F32(&w), k_stride:1, n_stride:k};
        let tp = fastest(20, || pack(isa,&mut p,k,n,src(),1.0).unwrap());
        let mut p2 = vec![bf16::ZERO; panels_len::<bf16>(isa,k,n)];
        let src2 = || Source::Dense{data: Values::F32(&w), k_stride:n, n_stride:1};
        let ta = fastest(20, || pack(isa,&mut p2,k,n,src2(),1.0).unwrap());
        let b16: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
        let src3 = || Source::Dense{data: Values::Bf16(&b16), k_stride:n, n_stride:1};
        let tb = fastest(20, || pack(isa,&mut p2,k,n,src3(),1.0).unwrap());
        let mut cv = vec![0f32; m*n+16]; let o=cv.as_ptr().align_offset(64); let c=&mut cv[o..o+m*n]; let _=off_;
        let mut cb = vec![bf16::ZERO; m*n];
        let f = 2.0*(m*n*k) as f64*1e-9;
        let reps = 100;
        let t1 = fastest(reps, || gemm(isa,&mut c[..],n,m,n,Store::Overwrite,&[Term{a:Rows::row_major(&x[..],k),b:Panels{data:&p,k,n}}]).unwrap());
        let t2 = fastest(reps, || gemm(isa,&mut c[..],n,m,n,Store::Overwrite,&[Term{a:Rows::row_major(&xb[..],k),b:Panels{data:&p,k,n}}]).unwrap());
        let t3 = fastest(reps, || gemm(isa,&mut cb[..],n,m,n,Store::Overwrite,&[Term{a:Rows::row_major(&xb[..],k),b:Panels{data:&p,k,n}}]).unwrap());
        let t4 = fastest(reps, || gemm(isa,&mut c[..],n,m,n,Store::Accumulate,&[Term{a:Rows::row_major(&xb[..],k),b:Panels{data:&p,k,n}}]).unwrap());
        let e = (n*k) as f64*1e-9;
        println!("{m}x{n}x{k}: f32->f32 {:.0}  bf->f32 {:.0} bf->bf {:.0} acc {:.0} GFLOP/s; pack along {:.3} across {:.3} acrossb {:.3} ns/elem", f/t1, f/t2, f/t3, f/t4, tp/e, ta/e, tb/e);
    }
}
