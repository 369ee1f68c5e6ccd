// Memory for a while: each thread keeps one buffer and hands out parts of it, first in, last out.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>

namespace fastbp::cpu {

// In tests: fill what is handed out with NaN, so that a number nobody wrote is seen.
inline std::atomic<bool> poison{false};

// Blocks that never move while parts of them are in use: what does not fit comes in a further block.
class Blocks {
 public:
  static constexpr size_t kLine = 64, kKept = size_t{8} << 20;

  ~Blocks() {
    while (last_) pop();
  }

  void* take(size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    if (!last_ || used + bytes > last_->begin + last_->size) {
      const size_t size = bytes > kKept ? bytes : kKept;
      void* data = aligned_alloc(kLine, size);
      if (!data) throw std::bad_alloc();
      last_ = new Block{static_cast<char*>(data), used, size, last_};
    }
    void* part = last_->data + (used - last_->begin);
    used += bytes;
    return part;
  }

  // Back to what was in use before; one block of the usual size stays for the next call.
  void release(size_t before) {
    used = before;
    while (last_ && last_->begin >= used && (last_->begin > 0 || last_->size > kKept)) pop();
  }

  size_t used = 0;

 private:
  struct Block {
    char* data;
    size_t begin, size;
    Block* previous;
  };

  void pop() {
    Block* gone = last_;
    last_ = gone->previous;
    free(gone->data);
    delete gone;
  }

  Block* last_ = nullptr;
};

// Parts of this thread's blocks, given back when the object dies.
class Scratch {
 public:
  Scratch() : before_(blocks_.used) {}
  ~Scratch() { blocks_.release(before_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class S>
  S* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    void* part = blocks_.take(bytes);
    if (poison) memset(part, 0xff, bytes);
    return static_cast<S*>(part);
  }

 private:
  static inline thread_local Blocks blocks_;
  size_t before_;
};

}  // namespace fastbp::cpu
