// SPDX-License-Identifier: Apache-2.0
// A libnvidia-ml.so.1 that reports GPUs which are not there, for nvidia-ml-py, vLLM and torch.
//
//   FAKE_NVML_COUNT       number of GPUs                  1
//   FAKE_NVML_NAME        device name                     NVIDIA RTX PRO 6000 Blackwell Workstation Edition
//   FAKE_NVML_CAPABILITY  compute capability, M.m         12.0
//   FAKE_NVML_MEMORY_GIB  device memory, GiB              96
//
// Signatures and structure layouts are those of NVIDIA's nvml.h.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef void *nvmlDevice_t;

enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
};

enum { MAX_DEVICES = 8, NVML_P2P_STATUS_NOT_SUPPORTED = 5 };

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;

static int initialized;

static const char *setting(const char *name, const char *fallback) {
    const char *value = getenv(name);
    return value ? value : fallback;
}

static unsigned device_count(void) {
    unsigned count = (unsigned)atoi(setting("FAKE_NVML_COUNT", "1"));
    return count < MAX_DEVICES ? count : MAX_DEVICES;
}

static unsigned long long memory_bytes(void) {
    return strtoull(setting("FAKE_NVML_MEMORY_GIB", "96"), NULL, 10) << 30;
}

// A handle is the device's index + 1, so that NULL is never valid.
static unsigned index_of(nvmlDevice_t device) { return (unsigned)(size_t)device - 1; }

static nvmlReturn_t check(nvmlDevice_t device) {
    if (!initialized) return NVML_ERROR_UNINITIALIZED;
    return index_of(device) < device_count() ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

static nvmlReturn_t copy_text(char *out, unsigned length, const char *text) {
    if (strlen(text) >= length) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, text);
    return NVML_SUCCESS;
}

static void uuid_text(char out[64], unsigned index) {
    snprintf(out, 64, "GPU-00000000-0000-0000-0000-%012x", index + 1);
}

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    initialized++;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    if (!initialized) return NVML_ERROR_UNINITIALIZED;
    initialized--;
    return NVML_SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
        case NVML_SUCCESS: return "Success";
        case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
        case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
        case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
        case NVML_ERROR_NOT_FOUND: return "Not Found";
        case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
        default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned length) {
    return copy_text(version, length, "580.95.05");
}

nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned length) {
    return copy_text(version, length, "13.580.95.05");
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = 13000;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialized) return NVML_ERROR_UNINITIALIZED;
    *count = device_count();
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    *device = (nvmlDevice_t)(size_t)(index + 1);
    return check(*device);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    if (!initialized) return NVML_ERROR_UNINITIALIZED;
    char candidate[64];
    for (unsigned index = 0; index < device_count(); index++) {
        uuid_text(candidate, index);
        if (strcmp(candidate, uuid) == 0) return nvmlDeviceGetHandleByIndex_v2(index, device);
    }
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index) {
    *index = index_of(device);
    return check(device);
}

nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor) {
    return nvmlDeviceGetIndex(device, minor);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length) {
    nvmlReturn_t status = check(device);
    if (status) return status;
    return copy_text(name, length, setting("FAKE_NVML_NAME", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"));
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length) {
    nvmlReturn_t status = check(device);
    if (status) return status;
    char text[64];
    uuid_text(text, index_of(device));
    return copy_text(uuid, length, text);
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    nvmlReturn_t status = check(device);
    if (status) return status;
    int fields = sscanf(setting("FAKE_NVML_CAPABILITY", "12.0"), "%d.%d", major, minor);
    return fields == 2 ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    nvmlReturn_t status = check(device);
    if (status) return status;
    memory->total = memory->free = memory_bytes();
    memory->used = 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    nvmlReturn_t status = check(device);
    if (status) return status;
    memory->total = memory->free = memory_bytes();
    memory->reserved = memory->used = 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci) {
    nvmlReturn_t status = check(device);
    if (status) return status;
    memset(pci, 0, sizeof *pci);
    pci->bus = index_of(device) + 1;
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "0000:%02X:00.0", pci->bus);
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t a, nvmlDevice_t b, unsigned kind, unsigned *status) {
    (void)kind;
    *status = NVML_P2P_STATUS_NOT_SUPPORTED;
    return check(a) ? check(a) : check(b);
}

nvmlReturn_t nvmlDeviceGetNumaNodeId(nvmlDevice_t device, unsigned *node) {
    *node = 0;
    return check(device);
}

nvmlReturn_t nvmlDeviceGetCpuAffinity(nvmlDevice_t device, unsigned words, unsigned long *mask) {
    memset(mask, 0xff, words * sizeof *mask);
    return check(device);
}
