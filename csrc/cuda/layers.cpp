#include "layers.h"

#include <cuda_runtime.h>

#include "../aten.h"
#include "../cpu/scratch.h"
#include "cublaslt.h"

namespace fastbp::cuda {

namespace {

void* data(const Maybe& tensor) { return tensor ? const_cast<void*>(tensor->const_data_ptr()) : nullptr; }

// A matrix as the fused products read it; what they cannot read is refused by product_refusal.
Operand operand(const Tensor& matrix) {
  const auto sizes = matrix.sizes(), strides = matrix.strides();
  const bool dense = sizes[1] == 1 || strides[1] == 1;
  return {matrix.const_data_ptr(), sizes[0], sizes[1], dense ? strides[0] : 0};
}

// Contiguous; a call of PyTorch's is spared where it is that already.
Tensor dense(const Tensor& tensor) {
  return tensor.dim() > 0 && Rows(tensor).contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Maybe packed(const Maybe& tensor) { return tensor ? Maybe(dense(*tensor)) : tensor; }

bool at(uintptr_t bytes, const Maybe& tensor) { return reinterpret_cast<uintptr_t>(data(tensor)) % bytes == 0; }

// What was kept, with adjacent columns.
Maybe rows_of(const Maybe& kept, int64_t rows) {
  if (!kept) return kept;
  const Tensor flat = matrix(*kept, rows);
  return flat.size(1) == 1 || flat.stride(1) == 1 ? flat : torch::stable::contiguous(flat);
}

}  // namespace

Tensor column_sum(const Tensor& matrix) {
  const int64_t rows = 0;
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
}

Layers::Layers(const Call& call)
    : call_(call),
      properties_(properties_of(call.device.index)),
      stream_(current_stream(call.device.index)),
      activation_{call.dtype, call.settings.activation, {call.settings.params[0], call.settings.params[1]}},
      route_(route_of(call.settings)) {}

Keeps Layers::keeps() const {
  switch (call_.settings.save) {
    case Save::output:
      return Keeps::y;
    case Save::output_bits:
      return Keeps::bits;
    case Save::output_lsb:
      return Keeps::lowest_bit;
    case Save::fp8:
      return Keeps::fp8;
    case Save::preact:
    case Save::recompute:
      break;
  }
  return Keeps::z;
}

const Maybe& Layers::kept(int64_t linear) const {
  return keeps() == Keeps::fp8 ? call_.codes[linear].tensor : call_.kept[linear];
}

// Contiguous, as codes are always (bytes_of in cpu/checks.cpp).
Maybe Layers::dense_kept(int64_t linear) const { return keeps() == Keeps::fp8 ? kept(linear) : packed(kept(linear)); }

Maybe Layers::beside(int64_t linear) const {
  if (keeps() == Keeps::fp8) return call_.scales[linear].tensor;
  return keeps() == Keeps::bits ? call_.bits[linear].tensor : std::nullopt;
}

void Layers::poison(const Tensor& tensor, int64_t bytes) const {
  if (cpu::poison) check_cuda(cudaMemsetAsync(tensor.mutable_data_ptr(), 0xff, tensor.numel() * bytes, stream_));
}

Tensor Layers::make(const std::vector<int64_t>& sizes, Dtype dtype) const {
  const Tensor made =
      cpu::empty(sizes.data(), static_cast<int64_t>(sizes.size()) - 1, sizes.back(), dtype, call_.device);
  poison(made, kItemSize[static_cast<int>(dtype)]);
  return made;
}

Tensor Layers::make_bytes(std::vector<int64_t> sizes, int64_t last) const {
  const Tensor made = cpu::empty_bytes(sizes.data(), static_cast<int64_t>(sizes.size()) - 1, last, call_.device);
  poison(made, 1);
  return made;
}

void Layers::make_kept(const std::vector<int64_t>& sizes, Forward& found) const {
  const int64_t n = sizes.back();
  for (int part = 0; part < call_.width(); ++part) {
    if (call_.settings.keeps_h()) found.kept[part] = found.y;
    if (call_.settings.keeps_bits()) found.beside[part] = make_bytes(sizes, bits_size(n));
    if (call_.settings.keeps_fp8()) {
      found.kept[part] = make_bytes(sizes, n);
      found.beside[part] = make_bytes(sizes, scales_size(n));
    }
  }
}

Tensor Layers::like(const Tensor& tensor) const {
  const auto sizes = tensor.sizes();
  return make({sizes.begin(), sizes.end()}, call_.dtype);
}

bool Layers::fuses(const Product& product) const {
  if (route_ == Route::cublaslt) return !library_refusal(activation_, product);
  return route_ == Route::fused && !product_refusal(product, call_.dtype, properties_.capability);
}

bool Layers::run(const Product& product) const {
  if (route_ == Route::fused) {
    launch_product(activation_, product, properties_.processors, stream_);
    return true;
  }
  const Tensor workspace = make({static_cast<int64_t>(kLibraryWorkspace / sizeof(float))}, Dtype::float32);
  return launch_library_product(activation_, product, call_.device.index, workspace.mutable_data_ptr(), stream_);
}

// The second stage of a bias gradient.
Maybe Layers::total(const Maybe& sums) const {
  if (!sums) return std::nullopt;
  const Tensor out = make({sums->size(1)}, call_.dtype);
  launch_column_sum(call_.dtype, sums->const_data_ptr(), out.mutable_data_ptr(), sums->size(0), sums->size(1), stream_);
  return out;
}

// y and what is kept, by a kernel of ours or of cuBLASLt's; false where there is none for it.
bool Layers::forward_fused(const Tensor& x, const Tensor* weights, const Maybe* biases, Forward& found) const {
  const int parts = call_.width();
  const Tensor flat = matrix(x, call_.rows);
  Product product{};
  product.kind = parts == 2 ? Product::gated_forward : Product::forward;
  product.keeps = keeps();
  product.a = operand(flat);
  product.b = operand(weights[0]);
  product.b2 = operand(weights[parts - 1]);
  product.m = call_.rows, product.n = weights[0].size(0), product.k = weights[0].size(1);
  Maybe bias[2];
  for (int part = 0; part < parts; ++part) bias[part] = packed(biases[part]);
  product.bias = data(bias[0]), product.bias2 = data(bias[1]);
  if (!fuses(product)) return false;
  std::vector<int64_t> sizes(call_.leading);
  sizes.push_back(product.n);
  Forward made{make(sizes, call_.dtype), {}, {}};
  make_kept(sizes, made);
  for (int part = 0; part < parts && call_.settings.keeps_z(); ++part) made.kept[part] = make(sizes, call_.dtype);
  if (!call_.settings.keeps_h()) product.first = data(made.kept[0]), product.second = data(made.kept[1]);
  product.first_beside = data(made.beside[0]), product.second_beside = data(made.beside[1]);
  product.y = data(made.y);
  if (!run(product)) return false;
  found = made;
  return true;
}

Layers::Forward Layers::forward(const Tensor& x, const Tensor* weights, const Maybe* biases) const {
  Forward found;
  const bool given = call_.settings.given;
  if (route_ != Route::library && !given && forward_fused(x, weights, biases, found)) return found;
  // Where PyTorch uses cuBLASLt the bias is added in its epilogue, and the pass need not read and write z for it.
  const bool gated = call_.settings.gated, keep = call_.settings.keeps_z();
  const auto made = [&](int part) { return dense(given ? *call_.kept[part] : linear(x, weights[part], biases[part])); };
  const Tensor z = made(0);
  const Maybe up = gated ? Maybe(made(1)) : std::nullopt;
  found.y = keep || given ? like(z) : z;  // over z, where that is the call's own
  const auto sizes = z.sizes();
  make_kept({sizes.begin(), sizes.end()}, found);
  if (call_.settings.compressed()) {
    CompressedValue value{};
    value.gate = z.const_data_ptr(), value.up = data(up), value.y = found.y.mutable_data_ptr();
    for (int part = 0; part < 2; ++part) {
      if (keeps() == Keeps::fp8) value.kept[part] = data(found.kept[part]);
      value.beside[part] = data(found.beside[part]);
    }
    launch_rows(value, sizes.back());
  } else if (keep || given || gated || !is_identity()) {
    launch(activation_, Value{z.const_data_ptr(), data(up), found.y.mutable_data_ptr(), z.numel()}, stream_);
  }
  if (keep) found.kept[0] = z, found.kept[1] = up;
  return found;
}

void Layers::launch_rows(CompressedValue& value, int64_t n) const {
  value.keeps = keeps();
  value.m = call_.rows, value.n = n;
  value.strips = strips_of(value.m, n, call_.dtype, properties_.processors);
  launch(activation_, value, stream_);
}

Tensor Layers::value(int64_t layer) const {
  const int64_t first = call_.first(layer);
  const Tensor z = *dense_kept(first);
  const Maybe u = call_.settings.gated ? dense_kept(first + 1) : std::nullopt;
  const Tensor y = like(z);
  if (keeps() == Keeps::fp8) {
    CompressedValue value{};
    value.gate = z.const_data_ptr(), value.up = data(u), value.y = y.mutable_data_ptr();
    for (int part = 0; part < call_.width(); ++part) value.scales[part] = data(beside(first + part));
    launch_rows(value, y.sizes().back());
  } else {
    launch(activation_, Value{z.const_data_ptr(), data(u), y.mutable_data_ptr(), z.numel()}, stream_);
  }
  return y;
}

Slope Layers::chain_rule(const Tensor& dh, int64_t layer, const Wanted& wanted, bool over_dh) const {
  const int64_t m = dh.size(0), n = dh.size(1), first = call_.first(layer);
  const bool gated = call_.settings.gated, overwrites = call_.settings.overwrites;
  Slope slope;
  if (!gated && is_identity() && keeps() != Keeps::fp8) {
    slope.dz[0] = dh;
    if (wanted.h) slope.h = matrix(*kept(first), m);
    if (wanted.db[0]) slope.db[0] = column_sum(dh);
    return slope;
  }
  const bool coded = keeps() == Keeps::fp8;
  const auto part_of = [&](int64_t linear) {  // the kernel of one linear counts with a stride
    if (coded) return kept(linear);
    return gated ? packed(rows_of(kept(linear), m)) : rows_of(kept(linear), m);
  };
  const Maybe gate = part_of(first), up = gated ? part_of(first + 1) : std::nullopt;
  const Maybe gate_beside = beside(first), up_beside = gated ? beside(first + 1) : std::nullopt;
  const Strips strips = strips_of(m, n, call_.dtype, properties_.processors);
  const Dtype wide = call_.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const auto contiguous = [](const Tensor& t) { return Rows(t).contiguous(); };
  // dz goes over dh where dh is ours, else over z where that is, else into memory of its own.
  const Maybe own[2] = {overwrites && gate && contiguous(*gate) ? gate
                        : over_dh && !gated                     ? Maybe(dh)
                                                                : std::nullopt,
                        gated && over_dh                      ? Maybe(dh)
                        : overwrites && up && contiguous(*up) ? up
                                                              : std::nullopt};
  Maybe sums[2];
  for (int part = 0; part < call_.width(); ++part) {
    if (wanted.dz[part]) slope.dz[part] = own[part] ? *own[part] : make({m, n}, call_.dtype);
    if (wanted.db[part]) sums[part] = make({strips.strips, n}, wide);
  }
  if (wanted.h) slope.h = make({m, n}, call_.dtype);
  const auto strides = dh.strides();
  if (gated) {
    const bool reads_up = wanted.dz[0] || wanted.h;
    GatedChainRule rule{};
    rule.dh = dh.const_data_ptr(), rule.gate = data(gate), rule.up = reads_up ? data(up) : nullptr;
    rule.gate_scales = data(gate_beside), rule.up_scales = data(up_beside), rule.keeps = keeps();
    rule.dgate = data(slope.dz[0]), rule.dup = data(slope.dz[1]), rule.h = data(slope.h);
    rule.gate_sums = data(sums[0]), rule.up_sums = data(sums[1]);
    rule.m = m, rule.n = n, rule.dh_stride = strides[0], rule.dh_column_stride = strides[1], rule.stride = n;
    rule.strips = strips;
    launch(activation_, rule, stream_);
  } else {
    ChainRule rule{};
    rule.dh = dh.const_data_ptr(), rule.kept = data(gate), rule.dz = data(slope.dz[0]), rule.h = data(slope.h);
    rule.beside = data(gate_beside), rule.sums = data(sums[0]);
    rule.m = m, rule.n = n, rule.dh_stride = strides[0], rule.dh_column_stride = strides[1];
    rule.stride = coded ? n : gate->stride(0), rule.keeps = keeps(), rule.strips = strips;
    launch(activation_, rule, stream_);
  }
  for (int part = 0; part < call_.width(); ++part) slope.db[part] = total(sums[part]);
  return slope;
}

Slope Layers::dgrad(const Tensor& d, const Tensor& weight, int64_t layer, const Wanted& wanted) const {
  if (route_ == Route::library) return chain_rule(mm(d, weight), layer, wanted, true);
  const int64_t m = d.size(0), k = d.size(1), n = weight.size(1), first = call_.first(layer);
  const bool gated = call_.settings.gated;
  const Maybe gate = dense_kept(first), up = gated ? dense_kept(first + 1) : std::nullopt;
  const Maybe gate_beside = beside(first), up_beside = gated ? beside(first + 1) : std::nullopt;
  Product product{};
  product.kind = gated ? Product::gated_dgrad : Product::dgrad;
  product.keeps = keeps();
  product.a = operand(d);
  product.b = operand(weight);
  product.m = m, product.n = n, product.k = k;
  const bool both = !gated || (up && wanted.dz[0] && wanted.dz[1]);
  const uintptr_t pack = keeps() == Keeps::fp8 ? 8 : 16;
  const bool readable = gate && at(pack, gate) && at(pack, up) && (keeps() != Keeps::bits || at(4, gate_beside));
  if (!both || !readable || (!gated && is_identity()) || !fuses(product)) {
    return chain_rule(mm(d, weight), layer, wanted, true);
  }
  Slope slope;
  Maybe sums[2];
  if (route_ == Route::cublaslt) {
    slope.dz[0] = make({m, n}, call_.dtype);
    if (wanted.db[0]) slope.db[0] = make({n}, call_.dtype);
    product.gate = data(gate), product.first = data(slope.dz[0]), product.bias_gradient = data(slope.db[0]);
    if (!run(product)) return chain_rule(mm(d, weight), layer, wanted, true);
    if (wanted.h) slope.h = matrix(value(layer), m);
    return slope;
  }
  for (int part = 0; part < call_.width(); ++part) {
    const Maybe& residual = part == 0 ? gate : up;
    slope.dz[part] = call_.settings.overwrites ? matrix(*residual, m) : make({m, n}, call_.dtype);
    if (wanted.db[part]) sums[part] = make({(m + kTileRows - 1) / kTileRows, n}, Dtype::float32);
  }
  if (wanted.h) slope.h = make({m, n}, call_.dtype);
  product.gate = data(gate), product.up = data(up);
  product.gate_beside = data(gate_beside), product.up_beside = data(up_beside);
  product.first = data(slope.dz[0]), product.second = data(slope.dz[1]), product.y = data(slope.h);
  product.sums = static_cast<float*>(data(sums[0])), product.sums2 = static_cast<float*>(data(sums[1]));
  run(product);
  for (int part = 0; part < call_.width(); ++part) slope.db[part] = total(sums[part]);
  return slope;
}

}  // namespace fastbp::cuda
