//! The CUDA driver's functions, found when they are first called: so that a binary with this feature starts on any machine.
//!
//! `cust` declares these symbols and would have the linker find them in libcuda. Here they are: each looks itself up in
//! libcuda.so.1 and passes its arguments on. Without a driver they return CUDA_ERROR_STUB_LIBRARY. All arguments are integers
//! or pointers, in registers or 8-byte stack slots; the five functions of the driver that take floats or structs by value are
//! left out, and nothing here calls them.

use core::ffi::{CStr, c_char, c_void};
use libloading::Library;
use std::error::Error;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

const LIBRARY: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

/// CUDA_ERROR_STUB_LIBRARY.
const NO_DRIVER: u32 = 34;
/// CUDA_ERROR_UNKNOWN.
const UNKNOWN: u32 = 999;

static DRIVER: OnceLock<Result<Library, String>> = OnceLock::new();

/// Opens the driver's library, once. Fails with what the system says.
#[inline(never)]
pub(super) fn driver() -> Result<&'static Library, &'static str> {
    let open = || {
        // SAFETY: the driver's initialisers do nothing but set up the driver.
        let library = unsafe { Library::new(LIBRARY) };
        library.map_err(|error| match error.source() {
            Some(cause) => format!("{LIBRARY} can't be opened: {cause}"),
            None => format!("{LIBRARY} can't be opened: {error}"),
        })
    };
    DRIVER.get_or_init(open).as_ref().map_err(String::as_str)
}

/// The function's address, or `None` without a driver or in one that hasn't got it.
fn find(found: &AtomicUsize, name: &CStr) -> Option<usize> {
    let address = found.load(Ordering::Relaxed);
    if address != 0 {
        return Some(address);
    }
    // SAFETY: only the address is taken; the library is never closed.
    let symbol = unsafe { driver().ok()?.get::<*const c_void>(name.to_bytes_with_nul()).ok()? };
    let address = *symbol as usize;
    found.store(address, Ordering::Relaxed);
    Some(address)
}

/// cust's enum of results knows CUDA 11.4's; a value outside of it would be undefined behaviour.
fn known(code: u32) -> u32 {
    match code {
        0..=8 | 34 | 100..=102 | 200..=202 | 205..=224 | 300..=304 | 400 | 401 | 500 | 600 => code,
        700..=705 | 708..=720 | 800..=809 | 900..=911 => code,
        _ => UNKNOWN,
    }
}

/// One function a name; `(a, b): f g;` are those with two arguments.
macro_rules! symbols {
    ($($arguments:tt: $($name:ident)*;)*) => { $($(symbols! { @one $arguments $name })*)* };
    (@one ($($argument:ident),*) $name:ident) => {
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: usize),*) -> u32 {
            static FOUND: AtomicUsize = AtomicUsize::new(0);
            const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => unreachable!(),
            };
            let Some(address) = find(&FOUND, NAME) else { return NO_DRIVER };
            // SAFETY: the driver's function of this name takes so many integers or pointers, see the module's heading.
            known(unsafe { core::mem::transmute::<usize, extern "C" fn($(symbols!(@usize $argument)),*) -> u32>(address) }(
                $($argument),*
            ))
        }
    };
    (@usize $argument:ident) => { usize };
}

/// The driver's own text, or one of ours without it.
#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(error: u32, text: *mut *const c_char) -> u32 {
    static FOUND: AtomicUsize = AtomicUsize::new(0);
    match find(&FOUND, c"cuGetErrorString") {
        // SAFETY: the driver's signature.
        Some(address) => known(unsafe {
            core::mem::transmute::<usize, extern "C" fn(u32, *mut *const c_char) -> u32>(address)(error, text)
        }),
        None => {
            // SAFETY: the caller gives room for a pointer.
            unsafe { *text = c"no CUDA driver".as_ptr() };
            0
        }
    }
}

#[rustfmt::skip]
symbols! {
    (): cuCtxSynchronize cuCtxResetPersistingL2Cache cuProfilerStart cuProfilerStop;
    (a): cuInit cuDriverGetVersion cuDeviceGetCount cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset_v2
        cuCtxDestroy_v2 cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuCtxSetCurrent cuCtxGetCurrent cuCtxGetDevice
        cuCtxGetFlags cuCtxGetCacheConfig cuCtxSetCacheConfig cuCtxGetSharedMemConfig cuCtxSetSharedMemConfig
        cuCtxDetach cuModuleUnload cuLinkDestroy cuMemFree_v2 cuMemFreeHost cuIpcCloseMemHandle cuMemHostUnregister
        cuMemcpy2D_v2 cuMemcpy2DUnaligned_v2 cuMemcpy3D_v2 cuMemcpy3DPeer cuArrayDestroy cuMipmappedArrayDestroy
        cuMemRelease cuMemPoolDestroy cuThreadExchangeStreamCaptureMode cuStreamQuery cuStreamSynchronize
        cuStreamDestroy_v2 cuEventQuery cuEventSynchronize cuEventDestroy_v2 cuDestroyExternalMemory
        cuDestroyExternalSemaphore cuLaunch cuDeviceGraphMemTrim cuGraphDestroyNode cuGraphExecDestroy cuGraphDestroy
        cuTexRefCreate cuTexRefDestroy cuTexObjectDestroy cuSurfObjectDestroy cuCtxDisablePeerAccess
        cuGraphicsUnregisterResource;
    (a, b): cuGetErrorName cuDeviceGet cuDeviceGetUuid cuDeviceGetUuid_v2 cuDeviceTotalMem_v2 cuDeviceSetMemPool
        cuDeviceGetMemPool cuDeviceGetDefaultMemPool cuFlushGPUDirectRDMAWrites cuDeviceGetProperties
        cuDevicePrimaryCtxRetain cuDevicePrimaryCtxSetFlags_v2 cuCtxSetLimit cuCtxGetLimit cuCtxGetApiVersion
        cuCtxGetStreamPriorityRange cuCtxGetExecAffinity cuCtxAttach cuModuleLoad cuModuleLoadData
        cuModuleLoadFatBinary cuMemGetInfo_v2 cuMemAlloc_v2 cuMemAllocHost_v2 cuMemHostGetFlags cuDeviceGetByPCIBusId
        cuIpcGetEventHandle cuIpcGetMemHandle cuMemcpy2DAsync_v2 cuMemcpy3DAsync_v2 cuMemcpy3DPeerAsync
        cuArrayCreate_v2 cuArrayGetDescriptor_v2 cuArrayGetSparseProperties cuMipmappedArrayGetSparseProperties
        cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuMemAddressFree cuMemUnmap
        cuMemGetAllocationPropertiesFromHandle cuMemRetainAllocationHandle cuMemFreeAsync cuMemPoolTrimTo
        cuMemPoolCreate cuMemPoolExportPointer cuStreamCreate cuStreamGetPriority cuStreamGetFlags cuStreamGetCtx
        cuStreamBeginCapture_v2 cuStreamEndCapture cuStreamIsCapturing cuStreamCopyAttributes cuEventCreate
        cuEventRecord cuImportExternalMemory cuImportExternalSemaphore cuFuncSetCacheConfig cuFuncSetSharedMemConfig
        cuFuncGetModule cuFuncSetSharedSize cuParamSetSize cuGraphCreate cuGraphKernelNodeGetParams
        cuGraphKernelNodeSetParams cuGraphMemcpyNodeGetParams cuGraphMemcpyNodeSetParams cuGraphMemsetNodeGetParams
        cuGraphMemsetNodeSetParams cuGraphHostNodeGetParams cuGraphHostNodeSetParams cuGraphChildGraphNodeGetGraph
        cuGraphEventRecordNodeGetEvent cuGraphEventRecordNodeSetEvent cuGraphEventWaitNodeGetEvent
        cuGraphEventWaitNodeSetEvent cuGraphExternalSemaphoresSignalNodeGetParams
        cuGraphExternalSemaphoresSignalNodeSetParams cuGraphExternalSemaphoresWaitNodeGetParams
        cuGraphExternalSemaphoresWaitNodeSetParams cuGraphMemAllocNodeGetParams cuGraphMemFreeNodeGetParams
        cuGraphClone cuGraphNodeGetType cuGraphUpload cuGraphLaunch cuGraphKernelNodeCopyAttributes cuUserObjectRetain
        cuUserObjectRelease cuTexRefSetFilterMode cuTexRefSetMipmapFilterMode cuTexRefSetMaxAnisotropy
        cuTexRefSetBorderColor cuTexRefSetFlags cuTexRefGetAddress_v2 cuTexRefGetArray cuTexRefGetMipmappedArray
        cuTexRefGetFilterMode cuTexRefGetMipmapFilterMode cuTexRefGetMipmapLevelBias cuTexRefGetMaxAnisotropy
        cuTexRefGetBorderColor cuTexRefGetFlags cuSurfRefGetArray cuTexObjectGetResourceDesc cuTexObjectGetTextureDesc
        cuTexObjectGetResourceViewDesc cuSurfObjectCreate cuSurfObjectGetResourceDesc cuCtxEnablePeerAccess
        cuGraphicsResourceGetMappedMipmappedArray cuGraphicsResourceSetMapFlags_v2 cuGetExportTable;
    (a, b, c): cuDeviceGetName cuDeviceGetLuid cuDeviceGetAttribute cuDeviceGetNvSciSyncAttributes
        cuDeviceComputeCapability cuDevicePrimaryCtxGetState cuDeviceGetExecAffinitySupport cuCtxCreate_v2
        cuModuleGetFunction cuModuleGetTexRef cuModuleGetSurfRef cuLinkComplete cuMemGetAddressRange_v2 cuMemHostAlloc
        cuMemHostGetDevicePointer_v2 cuMemAllocManaged cuDeviceGetPCIBusId cuMemHostRegister_v2 cuMemcpy
        cuMemcpyHtoD_v2 cuMemcpyDtoH_v2 cuMemcpyDtoD_v2 cuMemsetD8_v2 cuMemsetD16_v2 cuMemsetD32_v2 cuArrayGetPlane
        cuMipmappedArrayCreate cuMipmappedArrayGetLevel cuMemMapArrayAsync cuMemGetAccess
        cuMemImportFromShareableHandle cuMemGetAllocationGranularity cuMemAllocAsync cuMemPoolSetAttribute
        cuMemPoolGetAttribute cuMemPoolSetAccess cuMemPoolGetAccess cuMemPoolImportPointer cuPointerGetAttribute
        cuPointerSetAttribute cuStreamCreateWithPriority cuStreamWaitEvent cuStreamGetCaptureInfo cuStreamGetAttribute
        cuStreamSetAttribute cuEventRecordWithFlags cuEventElapsedTime cuExternalMemoryGetMappedBuffer
        cuExternalMemoryGetMappedMipmappedArray cuFuncGetAttribute cuFuncSetAttribute
        cuLaunchCooperativeKernelMultiDevice cuLaunchHostFunc cuParamSeti cuLaunchGrid cuParamSetTexRef
        cuDeviceGetGraphMemAttribute cuDeviceSetGraphMemAttribute cuGraphNodeFindInClone cuGraphGetNodes
        cuGraphGetRootNodes cuGraphNodeGetDependencies cuGraphNodeGetDependentNodes cuGraphInstantiateWithFlags
        cuGraphExecKernelNodeSetParams cuGraphExecHostNodeSetParams cuGraphExecChildGraphNodeSetParams
        cuGraphExecEventRecordNodeSetEvent cuGraphExecEventWaitNodeSetEvent
        cuGraphExecExternalSemaphoresSignalNodeSetParams cuGraphExecExternalSemaphoresWaitNodeSetParams
        cuGraphKernelNodeGetAttribute cuGraphKernelNodeSetAttribute cuGraphDebugDotPrint cuGraphReleaseUserObject
        cuTexRefSetArray cuTexRefSetMipmappedArray cuTexRefSetFormat cuTexRefSetAddressMode cuTexRefGetAddressMode
        cuTexRefGetFormat cuTexRefGetMipmapLevelClamp cuSurfRefSetArray cuDeviceCanAccessPeer
        cuGraphicsResourceGetMappedPointer_v2 cuGraphicsMapResources cuGraphicsUnmapResources cuProfilerInitialize;
    (a, b, c, d): cuDeviceGetTexture1DLinearMaxWidth cuModuleGetGlobal_v2 cuLinkCreate_v2 cuMemcpyDtoA_v2
        cuMemcpyAtoD_v2 cuMemcpyHtoA_v2 cuMemcpyAtoH_v2 cuMemcpyAsync cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2
        cuMemcpyDtoDAsync_v2 cuMemsetD8Async cuMemsetD16Async cuMemsetD32Async cuMemCreate cuMemSetAccess
        cuMemExportToShareableHandle cuMemAllocFromPoolAsync cuMemPoolExportToShareableHandle
        cuMemPoolImportFromShareableHandle cuMemPrefetchAsync cuMemAdvise cuPointerGetAttributes cuStreamAddCallback
        cuStreamUpdateCaptureDependencies cuStreamAttachMemAsync cuSignalExternalSemaphoresAsync
        cuWaitExternalSemaphoresAsync cuStreamWaitValue32 cuStreamWaitValue64 cuStreamWriteValue32
        cuStreamWriteValue64 cuStreamBatchMemOp cuFuncSetBlockShape cuParamSetv cuLaunchGridAsync cuGraphAddEmptyNode
        cuGraphGetEdges cuGraphAddDependencies cuGraphRemoveDependencies cuGraphExecMemcpyNodeSetParams
        cuGraphExecMemsetNodeSetParams cuGraphExecUpdate cuGraphRetainUserObject
        cuOccupancyMaxActiveBlocksPerMultiprocessor cuOccupancyAvailableDynamicSMemPerBlock cuTexRefSetAddress_v2
        cuTexRefSetAddress2D_v3 cuTexObjectCreate cuDeviceGetP2PAttribute cuGraphicsSubResourceGetMappedArray
        cuGetProcAddress;
    (a, b, c, d, e): cuCtxCreate_v3 cuModuleLoadDataEx cuMemAllocPitch_v2 cuMemcpyPeer cuMemcpyAtoA_v2
        cuMemcpyHtoAAsync_v2 cuMemcpyAtoHAsync_v2 cuMemsetD2D8_v2 cuMemsetD2D16_v2 cuMemsetD2D32_v2
        cuMemAddressReserve cuMemMap cuMemRangeGetAttribute cuGraphAddKernelNode cuGraphAddHostNode
        cuGraphAddChildGraphNode cuGraphAddEventRecordNode cuGraphAddEventWaitNode
        cuGraphAddExternalSemaphoresSignalNode cuGraphAddExternalSemaphoresWaitNode cuGraphAddMemAllocNode
        cuGraphAddMemFreeNode cuGraphInstantiate_v2 cuUserObjectCreate
        cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags;
    (a, b, c, d, e, f): cuLinkAddFile_v2 cuMemcpyPeerAsync cuMemsetD2D8Async cuMemsetD2D16Async cuMemsetD2D32Async
        cuMemRangeGetAttributes cuStreamGetCaptureInfo_v2 cuGraphAddMemcpyNode cuGraphAddMemsetNode
        cuOccupancyMaxPotentialBlockSize;
    (a, b, c, d, e, f, g): cuOccupancyMaxPotentialBlockSizeWithFlags;
    (a, b, c, d, e, f, g, h): cuLinkAddData_v2;
    (a, b, c, d, e, f, g, h, i, j): cuLaunchCooperativeKernel;
    (a, b, c, d, e, f, g, h, i, j, k): cuLaunchKernel;
}
