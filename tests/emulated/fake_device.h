// A GPU of the tests: its memory, its launches and its tensor maps. The kernels run in the emulator of PTX
// (tests/ptxsim), which Python plugs in; CUDA's runtime (fake_cudart.cpp) and driver (fake_libcuda.cpp) rest on this.
#pragma once

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

#pragma GCC visibility push(default)
extern "C" {

// What a launch says. emulator.py has the same fields in the same order.
struct EmulatedLaunch {
  const char *image, *name;  // PTX, and the kernel's name in it
  uint32_t grid[3], block[3];
  uint32_t cluster;          // 0 where the launch does not say
  uint32_t shared, granted;  // bytes of dynamic shared memory, and how many the function may have
  void** arguments;
};

// 0, or not, and then emulated_words says why.
int emulated_launch(const EmulatedLaunch* launch);
const char* emulated_words();
// What Python plugs in: to run a launch, and to say what went wrong in it.
void emulated_plug(int (*run)(const EmulatedLaunch*));
void emulated_fail(const char* words);

// The memory, at addresses of this process: bytes, and of each byte whether it is nobody's (0), to be read (1) or to be
// written too (2). What is freed is nobody's, and is the last to be handed out again.
void emulated_memory(uint8_t** bytes, uint8_t** owners, size_t* size);
void* emulated_allocate(size_t size);
void emulated_free(void* data);
// Where the allocation begins that holds an address, or the last one before it, and its size; 0 if there is none.
uint64_t emulated_allocation(uint64_t address, size_t* size);
// While it is on, PyTorch's tensors of the CPU are allocated there.
void emulated_allocates(int on);

// Which of the faults that a test has put into sources (faults.h) is on; "" for none.
void emulated_set_fault(const char* name);

// cuTensorMapEncodeTiled, as far as the kernels go: 2 dimensions, zeros outside. The map holds what it is told.
CUresult emulated_encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                         const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                         const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                         CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

}  // extern "C"
#pragma GCC visibility pop

constexpr int kEmulatedProcessors = 4;  // few, so that a block of a persistent kernel has more than one tile
constexpr int kSharedOfBlock = 227 << 10, kSharedUnasked = 48 << 10;
