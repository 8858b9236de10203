// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 with no device: vLLM's, FlashMLA's and torch's extensions link and load against it, every driver call fails.
// cuInit answers CUDA_ERROR_NO_DEVICE, all others CUDA_ERROR_NOT_INITIALIZED, so a test that reached the GPU would say so.

#include <stdint.h>

enum { CUDA_SUCCESS = 0, CUDA_ERROR_NOT_INITIALIZED = 3, CUDA_ERROR_NO_DEVICE = 100 };

int cuInit(unsigned flags) {
    (void)flags;
    return CUDA_ERROR_NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = 0;
    return CUDA_ERROR_NOT_INITIALIZED;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, void *status) {
    (void)symbol, (void)version, (void)flags, (void)status;
    *function = 0;
    return CUDA_ERROR_NOT_INITIALIZED;
}

#define FAILS(name) \
    int name(void) { return CUDA_ERROR_NOT_INITIALIZED; }

FAILS(cuCtxGetCurrent)
FAILS(cuCtxSetCurrent)
FAILS(cuDeviceGet)
FAILS(cuDeviceGetAttribute)
FAILS(cuDevicePrimaryCtxGetState)
FAILS(cuDevicePrimaryCtxRetain)
FAILS(cuFuncGetAttribute)
FAILS(cuFuncSetAttribute)
FAILS(cuFuncSetCacheConfig)
FAILS(cuGetErrorString)
FAILS(cuLaunchCooperativeKernel)
FAILS(cuLaunchKernel)
FAILS(cuLinkAddData_v2)
FAILS(cuLinkComplete)
FAILS(cuLinkCreate_v2)
FAILS(cuMemAddressFree)
FAILS(cuMemAddressReserve)
FAILS(cuMemCreate)
FAILS(cuMemGetAllocationGranularity)
FAILS(cuMemMap)
FAILS(cuMemRelease)
FAILS(cuMemSetAccess)
FAILS(cuMemUnmap)
FAILS(cuModuleGetFunction)
FAILS(cuModuleLoad)
FAILS(cuModuleLoadData)
FAILS(cuModuleLoadDataEx)
FAILS(cuModuleUnload)
FAILS(cuOccupancyMaxActiveBlocksPerMultiprocessor)
FAILS(cuPointerGetAttribute)
FAILS(cuTensorMapEncodeTiled)
