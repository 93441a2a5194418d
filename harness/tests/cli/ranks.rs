//! What a build without MPI says to one who starts several ranks of it. `.ci/mpi` tests the one with MPI.

use super::support::{Scratch, assets, command};

#[test]
fn several_ranks_need_mpi() {
    let scratch = Scratch::new("ranks");
    let (model, data, out) = (assets("model"), assets("corpus/test.jsonl"), scratch.path("run"));
    let finetune = format!("finetune --model {model} --data {data} --out {out} --steps 1");
    let eval = format!("eval loss --model {model} --data {data}");
    for (line, size) in [(&finetune, "OMPI_COMM_WORLD_SIZE"), (&eval, "PMI_SIZE")] {
        let output = command(line).env(size, "3").output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let expected = "error: started as one of 3 ranks, and this build has no MPI; build hydra with --features mpi\n";
        assert!(output.status.code() == Some(1) && said == expected, "{line}: {said}");
    }
    assert!(scratch.names("").is_empty());
    // One rank is no more than a process.
    assert!(command(&finetune).env("OMPI_COMM_WORLD_SIZE", "1").output().unwrap().status.success());
}
