// Tensors seen as rows of numbers, or of what compressed policies keep of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../compression.h"
#include "kernels.h"

namespace fastbp::cpu {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

struct Out;

// Rows of bytes that a compressed policy keeps, contiguous; nothing where backward does not read them.
struct Bytes {
  Maybe tensor;
  int64_t size = 0, row = 0;  // of a row; the first row

  Bytes() = default;
  explicit Bytes(const Tensor& bytes) : tensor(bytes), size(bytes.sizes().back()) {}
  explicit operator bool() const { return tensor.has_value(); }
  const uint8_t* at(int64_t r, int64_t column) const {
    return static_cast<const uint8_t*>(tensor->const_data_ptr()) + (row + r) * size + column;
  }
  // To be written; null where nothing is kept.
  uint8_t* over(int64_t r, int64_t column) const { return tensor ? const_cast<uint8_t*>(at(r, column)) : nullptr; }
};

// The last dimension of a tensor as rows, all others counted through; any strides.
class Rows {
 public:
  Rows() = default;
  explicit Rows(const Tensor& tensor);
  // Numbers of a dtype that are kept in fp8: they can be read, from the beginning of a block, and do not lie anywhere.
  Rows(const Bytes& codes, const Bytes& scales, int64_t rows, Dtype dtype);
  // Those of a result.
  Rows(const struct Out& out, int64_t rows);
  // Whether there is a tensor behind it.
  bool any() const { return any_; }
  bool coded() const { return scales_ != nullptr; }
  const void* at(int64_t row, int64_t column) const;
  // Whether each row is one piece of memory, and all rows row_stride() apart.
  bool dense() const { return uniform_ && stride_ == 1 && !coded(); }
  // Such rows, if they are of S; null otherwise.
  template <class S>
  const S* dense_as() const {
    return dense() && kItemSize[static_cast<int>(dtype_)] == sizeof(S) ? static_cast<const S*>(at(0, 0)) : nullptr;
  }
  int64_t row_stride() const { return row_stride_; }
  bool contiguous() const { return dense() && (count < 2 || row_stride_ == size); }
  // Contiguous rows, to be written over.
  Out over() const;
  // Rows [r, r + rows) alone.
  Rows slice(int64_t r, int64_t rows) const {
    Rows part = *this;
    part.first_ += r;
    part.count = rows;
    return part;
  }

  int64_t count = 0, size = 0;

  // Numbers [c, c + n) of rows [r, r + rows), to rows `to_stride` apart.
  template <class S>
  void read(int64_t r, int64_t rows, int64_t c, int64_t n, S* to, int64_t to_stride) const {
    const auto& k = kernels<S>();
    if (coded()) return decode(k.rounded[static_cast<int>(dtype_)], r, rows, c, n, to, to_stride);
    for (int64_t i = 0; i < rows; ++i) k.read(dtype_, n, at(r + i, c), stride_, to + i * to_stride);
  }
  // Whole rows of fp8 as numbers of S, which are the dtype's own.
  template <class S>
  void decode_own(int64_t r, int64_t rows, S* to, int64_t to_stride) const {
    decode(kernels<float>().compressed[static_cast<int>(dtype_)], r, rows, 0, size, to, to_stride);
  }

 private:
  bool any_ = false;
  const void* data_ = nullptr;
  Dtype dtype_ = Dtype::float32;
  int64_t stride_ = 1, row_stride_ = 0, first_ = 0;
  bool uniform_ = true;  // whether rows are row_stride_ apart; else their places follow from sizes_ and strides_
  std::vector<int64_t> sizes_, strides_;
  const uint8_t* scales_ = nullptr;  // of fp8, whose codes are at data_

  template <class S>
  void decode(const Compressed& loops, int64_t r, int64_t rows, int64_t c, int64_t n, S* to, int64_t to_stride) const {
    const auto* codes = static_cast<const uint8_t*>(data_);
    for (int64_t i = first_ + r; i < first_ + r + rows; ++i, to += to_stride) {
      loops.decode(n, codes + i * size + c, scales_ + i * scales_size(size) + c / kBlock, to);
    }
  }
};

// A contiguous result of rows.
struct Out {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t size = 0;

  Out() = default;
  explicit Out(const Tensor& tensor);
  explicit operator bool() const { return data != nullptr; }
  // The rows from r on.
  Out from(int64_t r) const {
    Out part = *this;
    if (data) part.data = static_cast<char*>(at(r, 0));
    return part;
  }

  void* at(int64_t row, int64_t column) const {
    return data + (row * size + column) * kItemSize[static_cast<int>(dtype)];
  }
  // Where numbers of S may be written at once; null where they must be converted on the way.
  template <class S>
  S* direct(int64_t row, int64_t column) const {
    return data && kItemSize[static_cast<int>(dtype)] == sizeof(S) ? static_cast<S*>(at(row, column)) : nullptr;
  }
  template <class S>
  void write(int64_t r, int64_t rows, int64_t c, int64_t n, const S* from, int64_t from_stride) const {
    const auto& k = kernels<S>();
    for (int64_t i = 0; i < rows; ++i) k.write(dtype, n, from + i * from_stride, at(r + i, c));
  }
};

inline Rows::Rows(const Out& out, int64_t rows)
    : count(rows), size(out.size), any_(true), data_(out.data), dtype_(out.dtype), row_stride_(out.size) {}

inline Out Rows::over() const {
  Out out;
  out.data = static_cast<char*>(const_cast<void*>(at(0, 0)));
  out.dtype = dtype_;
  out.size = size;
  return out;
}

}  // namespace fastbp::cpu
