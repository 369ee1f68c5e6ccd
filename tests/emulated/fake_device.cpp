#include "fake_device.h"

#include <c10/core/CPUAllocator.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "faults.h"

namespace {

// ptxsim/memory.py has the same address. Nothing of a process on Linux lies there.
const auto kBase = reinterpret_cast<uint8_t*>(0x400000000000);
constexpr size_t kSize = size_t{128} << 20, kRedZone = 512;
constexpr uint8_t kPoison = 0xff;  // NaN in every dtype

uint8_t* mapped(uint8_t* at) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED_NOREPLACE : 0);
  void* found = mmap(at, kSize, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (found == MAP_FAILED || (at && found != at))
    throw std::runtime_error("no room for the memory of the emulated GPU");
  return static_cast<uint8_t*>(found);
}

class Memory {
 public:
  void* allocate(size_t size) {
    const std::lock_guard hold(lock_);
    size_t start = fitting(next_, size);
    if (start + size + kRedZone > kSize) start = fitting(kRedZone, size);
    if (start + size + kRedZone > kSize) throw std::bad_alloc();
    memset(bytes + start - kRedZone, kPoison, size + 2 * kRedZone);
    memset(owners + start, 2, size);
    next_ = start + size + kRedZone;
    allocations_[reinterpret_cast<uint64_t>(bytes + start)] = size;
    return bytes + start;
  }

  void free(void* data) {
    const std::lock_guard hold(lock_);
    const auto found = allocations_.find(reinterpret_cast<uint64_t>(data));
    if (found == allocations_.end()) return;
    memset(data, kPoison, found->second);
    memset(owners + (static_cast<uint8_t*>(data) - bytes), 0, found->second);
    allocations_.erase(found);
  }

  uint64_t before(uint64_t address, size_t* size) {
    const std::lock_guard hold(lock_);
    auto found = allocations_.upper_bound(address);
    if (found == allocations_.begin()) return 0;
    --found;
    *size = found->second;
    return found->first;
  }

  uint8_t *const bytes = mapped(kBase), *const owners = mapped(nullptr);

 private:
  // The first place from here on that is a red zone away from everything; aligned as PyTorch's allocator of a GPU does.
  size_t fitting(size_t from, size_t size) const {
    const auto aligned = [](size_t at) { return (at + kRedZone - 1) / kRedZone * kRedZone; };
    const auto start_of = [this](auto one) { return one->first - reinterpret_cast<uint64_t>(bytes); };
    const auto after = [&](auto one) { return aligned(start_of(one) + one->second + kRedZone); };
    size_t start = aligned(from);
    auto next = allocations_.lower_bound(reinterpret_cast<uint64_t>(bytes + start));
    if (next != allocations_.begin()) start = std::max<size_t>(start, after(std::prev(next)));
    for (; next != allocations_.end() && start_of(next) < start + size + kRedZone; ++next) start = after(next);
    return start;
  }

  std::mutex lock_;
  size_t next_ = kRedZone;
  std::map<uint64_t, size_t> allocations_;
};

Memory& memory() {
  static auto& one = *new Memory;  // tensors may outlive everything that is static
  return one;
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? memory().allocate(size) : nullptr;
    return {data, data, &emulated_free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &emulated_free; }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }
};

int (*plugged)(const EmulatedLaunch*) = nullptr;
std::string words, fault;

// What cuTensorMapEncodeTiled is told; emulator.py reads it.
struct Told {
  uint64_t magic, address, sizes[2], stride;
  uint32_t box[2], item, swizzle;
};
static_assert(sizeof(Told) <= sizeof(CUtensorMap));

}  // namespace

int emulated_launch(const EmulatedLaunch* launch) {
  if (plugged) return plugged(launch);
  words = "no emulator is plugged in";
  return 1;
}
const char* emulated_words() { return words.c_str(); }
void emulated_plug(int (*run)(const EmulatedLaunch*)) { plugged = run; }
void emulated_fail(const char* why) { words = why; }

void emulated_set_fault(const char* name) { fault = name; }
int emulated_fault_is(const char* name) { return fault == name; }

void emulated_memory(uint8_t** bytes, uint8_t** owners, size_t* size) {
  *bytes = memory().bytes, *owners = memory().owners, *size = kSize;
}
void* emulated_allocate(size_t size) { return memory().allocate(size); }
void emulated_free(void* data) { memory().free(data); }
uint64_t emulated_allocation(uint64_t address, size_t* size) { return memory().before(address, size); }

void emulated_allocates(int on) {
  static Allocator ours;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &ours : usual);
}

CUresult emulated_encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                         const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                         const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                         CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool numbers = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const uint32_t item = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : numbers ? 2 : 4;
  if (!numbers && type != CU_TENSOR_MAP_DATA_TYPE_UINT8 && type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (rank != 2 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_NOT_SUPPORTED;
  const uint32_t span = swizzle ? 16u << swizzle : 0, inner = box[0] * item;
  const bool sound = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
                     strides[0] % 16 == 0 && strides[0] < uint64_t{1} << 40 && strides[0] >= sizes[0] * item &&
                     inner % 16 == 0 && (!span || inner <= span);
  if (!sound) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i) {
    const bool fits = sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    if (!fits) return CUDA_ERROR_INVALID_VALUE;
  }
  const Told told{0x70616d5f726f736e,
                  reinterpret_cast<uint64_t>(address),
                  {sizes[0], sizes[1]},
                  strides[0],
                  {box[0], box[1]},
                  item,
                  span};
  memset(map, 0, sizeof(*map));
  memcpy(map, &told, sizeof(told));
  return CUDA_SUCCESS;
}
