#include "call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace fastbp::cpu {

namespace {

// PyTorch's numbers of the dtypes, in the order of ours.
const int32_t* dtype_numbers() {
  static const int32_t numbers[kDtypes] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(),
                                           aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return numbers;
}

// A contiguous tensor, of PyTorch's number of a dtype whose numbers have so many bytes.
Tensor empty_strided(const int64_t* leading, int64_t count, int64_t last, int32_t dtype, int64_t bytes, Device device) {
  constexpr int64_t kUsual = 8;  // dimensions for which no memory is asked
  const int64_t dims = count + 1;
  int64_t room[2 * kUsual];
  std::vector<int64_t> more(dims > kUsual ? 2 * dims : 0);
  int64_t *sizes = more.empty() ? room : more.data(), *strides = sizes + dims;
  std::copy_n(leading, count, sizes);
  sizes[count] = last;
  int64_t step = 1;
  for (int64_t i = dims; i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device.type, device.index, &handle));
  Tensor made(handle);
  if (poison && made.is_cpu()) memset(made.mutable_data_ptr(), 0xff, made.numel() * bytes);
  return made;
}

}  // namespace

Dtype dtype_of(const Tensor& tensor) {
  int32_t number;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  for (int i = 0; i < kDtypes; ++i) {
    if (number == dtype_numbers()[i]) return static_cast<Dtype>(i);
  }
  STD_TORCH_CHECK(false, "fastbp: tensors must be float64, float32, bfloat16 or float16");
}

Device device_of(const Tensor& tensor) {
  Device device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  if (device.type != aoti_torch_device_type_cpu()) {  // a CPU tensor's number is 0 or -1
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  }
  return device;
}

Tensor empty(const int64_t* leading, int64_t count, int64_t last, Dtype dtype, Device device) {
  const int d = static_cast<int>(dtype);
  return empty_strided(leading, count, last, dtype_numbers()[d], kItemSize[d], device);
}

Tensor empty_bytes(const int64_t* leading, int64_t count, int64_t last, Device device) {
  return empty_strided(leading, count, last, aoti_torch_dtype_uint8(), 1, device);
}

Rows::Rows(const Tensor& tensor) : any_(true), data_(tensor.const_data_ptr()), dtype_(dtype_of(tensor)) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t last = sizes.size() - 1;
  size = sizes[last];
  stride_ = size == 1 ? 1 : strides[last];
  count = 1;
  bool started = false;
  int64_t expected = 0;
  for (size_t i = last; i-- > 0;) {  // from the inside out: each dimension must go on where the one inside it ends
    count *= sizes[i];
    if (sizes[i] == 1) continue;
    if (!started) {
      row_stride_ = strides[i];
      started = true;
    } else if (strides[i] != expected) {
      uniform_ = false;
    }
    expected = strides[i] * sizes[i];
  }
  if (!uniform_) {
    sizes_.assign(sizes.begin(), sizes.end() - 1);
    strides_.assign(strides.begin(), strides.end() - 1);
  }
}

Rows::Rows(const Bytes& codes, const Bytes& scales, int64_t rows, Dtype dtype)
    : count(rows), size(codes.size), any_(true), data_(codes.tensor->const_data_ptr()), dtype_(dtype) {
  STD_TORCH_CHECK(scales, "fastbp_native: codes of fp8 need their scales");
  scales_ = static_cast<const uint8_t*>(scales.tensor->const_data_ptr());
}

const void* Rows::at(int64_t row, int64_t column) const {
  int64_t offset = column * stride_;
  row += first_;
  if (uniform_) {
    offset += row * row_stride_;
  } else {
    for (size_t i = sizes_.size(); i-- > 0; row /= sizes_[i]) offset += row % sizes_[i] * strides_[i];
  }
  return static_cast<const char*>(data_) + offset * kItemSize[static_cast<int>(dtype_)];
}

Out::Out(const Tensor& tensor)
    : data(static_cast<char*>(tensor.mutable_data_ptr())), dtype(dtype_of(tensor)), size(tensor.sizes().back()) {}

Tensor Call::make(int64_t features) const {
  return empty(leading.data(), static_cast<int64_t>(leading.size()), features, dtype);
}

template <class S>
Tensor Call::make_bias_gradient(const double* sums, int64_t size) const {
  Scratch scratch;
  S* row = scratch.take<S>(size);
  std::copy_n(sums, size, row);
  Tensor result = empty_row(size, dtype);
  kernels<S>().write(dtype, size, row, result.mutable_data_ptr());
  return result;
}

template <class S>
void Call::output(int64_t rows, int64_t n, const S* const* kept, int64_t kept_stride, S* to, int64_t to_stride,
                  uint8_t* bits, int64_t bits_stride) const {
  const Elementwise& in_s = loops<S>(kDtypeOf<S>);
  const bool sides = settings.from_side();  // these loops round, too
  if ((sides || !rounds<S>()) && kept_stride == n && to_stride == n &&
      (!bits || 2 * bits_stride == n)) {  // one long row
    n *= rows;
    rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i) {
    S* row = to + i * to_stride;
    const S* z = kept[0] + i * kept_stride;
    if (sides) {
      rounded<S>().value[settings.activation](n, z, row, bits ? bits + i * bits_stride : nullptr);
      continue;
    }
    if (settings.gated) {
      in_s.gated_value[settings.activation](n, z, kept[1] + i * kept_stride, row, settings.params);
    } else {
      in_s.value[settings.activation](n, z, row, settings.params);
    }
    round(n, row);
  }
}

template <class S>
void Call::slope(int64_t rows, int64_t n, const S* dh, int64_t stride, const S* const* kept, int64_t kept_stride,
                 S* const* dz, int64_t dz_stride, const uint8_t* bits, int64_t bits_stride) const {
  const Elementwise& in_s = loops<S>(kDtypeOf<S>);
  // One long row where rows lie close, which is worth most where a side is put together from many numbers; but not so
  // long that a rounded copy leaves the cache.
  constexpr int64_t most = 1 << 13;
  const bool joins = !rounds<S>() || (settings.from_side() && rows * n <= most);
  if (joins && stride == n && dz_stride == n && (!kept[0] || kept_stride == n) && (!bits || 2 * bits_stride == n)) {
    n *= rows;
    rows = 1;
  }
  Scratch scratch;
  S* rounded_dh = rounds<S>() ? scratch.take<S>(n) : nullptr;
  const auto at = [](auto* base, int64_t offset) { return base ? base + offset : nullptr; };
  for (int64_t i = 0; i < rows; ++i) {
    const S* dh_row = dh + i * stride;
    if (rounded_dh) {
      std::copy_n(dh_row, n, rounded_dh);
      round(n, rounded_dh);
      dh_row = rounded_dh;
    }
    const S* z = at(kept[0], i * kept_stride);
    S *first = at(dz[0], i * dz_stride), *second = settings.gated ? at(dz[1], i * dz_stride) : nullptr;
    if (settings.from_side()) {
      rounded<S>().grad[settings.activation](n, dh_row, z, at(bits, i * bits_stride), first);
    } else if (settings.gated) {
      const S* up = at(kept[1], i * kept_stride);
      in_s.gated_grad[settings.activation](n, dh_row, z, up, first, second, settings.params);
    } else {
      grad_of(in_s)(n, dh_row, z ? z : dh_row, first, settings.params);  // identity looks at nothing that was kept
    }
    if (first) round(n, first);
    if (second) round(n, second);
  }
}

template <class S>
void Call::read_input(int64_t layer, int64_t r, int64_t rows, int64_t c, int64_t n, S* to, int64_t to_stride) const {
  if (layer == 0) return x.read(r, rows, c, n, to, to_stride);
  const Rows* kept = &residuals[first(layer - 1)];
  kept[0].read(r, rows, c, n, to, to_stride);
  if (settings.from_output()) return;
  Scratch scratch;
  S* up = settings.gated ? scratch.take<S>(n) : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    if (up) kept[1].read(r + i, 1, c, n, up, n);
    const S* const parts[2] = {to + i * to_stride, up};
    output(1, n, parts, n, to + i * to_stride, n);
  }
}

template <class S>
void Call::read_slope(int64_t layer, int64_t r, int64_t rows, int64_t c, int64_t n, const S* dh, int64_t stride,
                      S* const* dz, int64_t dz_stride) const {
  Scratch scratch;
  const S* parts[2] = {nullptr, nullptr};
  const Rows* kept = &residuals[first(layer)];
  const bool as_it_is = kept[0].dense_as<S>() && (!settings.gated || kept[1].dense_as<S>() == nullptr ||
                                                  kept[1].row_stride() == kept[0].row_stride());
  for (int part = 0; part < width(); ++part) {
    if (!kept[part].any()) continue;
    if (as_it_is && kept[part].dense_as<S>()) {
      parts[part] = static_cast<const S*>(kept[part].at(r, c));
      continue;
    }
    S* copy = scratch.take<S>(rows * n);
    kept[part].read(r, rows, c, n, copy, n);
    parts[part] = copy;
  }
  slope(rows, n, dh, stride, parts, as_it_is ? kept[0].row_stride() : n, dz, dz_stride, bits_at(layer, r, c),
        bits_size(weights[first(layer)].out));
}

template <class S>
const S* read_bias(const Maybe& bias, Scratch& scratch) {
  if (!bias) return nullptr;
  const Rows row(*bias);
  S* numbers = scratch.take<S>(row.size);
  row.read(0, 1, 0, row.size, numbers, row.size);
  return numbers;
}

#define FASTBP_INSTANTIATE(S)                                                                                        \
  template Tensor Call::make_bias_gradient<S>(const double*, int64_t) const;                                         \
  template void Call::output(int64_t, int64_t, const S* const*, int64_t, S*, int64_t, uint8_t*, int64_t) const;      \
  template void Call::slope(int64_t, int64_t, const S*, int64_t, const S* const*, int64_t, S* const*, int64_t,       \
                            const uint8_t*, int64_t) const;                                                          \
  template void Call::read_input(int64_t, int64_t, int64_t, int64_t, int64_t, S*, int64_t) const;                    \
  template void Call::read_slope(int64_t, int64_t, int64_t, int64_t, int64_t, const S*, int64_t, S* const*, int64_t) \
      const;                                                                                                         \
  template const S* read_bias(const Maybe&, Scratch&);
FASTBP_INSTANTIATE(float)
FASTBP_INSTANTIATE(double)

}  // namespace fastbp::cpu
