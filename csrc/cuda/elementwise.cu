// The dtype of a launch, chosen; the kernels themselves are compiled in a file for each.
#include "elementwise.cuh"

namespace fastbp::cuda {

FASTBP_ELEMENTWISE(extern, Dtype::float64)
FASTBP_ELEMENTWISE(extern, Dtype::float32)
FASTBP_ELEMENTWISE(extern, Dtype::bfloat16)
FASTBP_ELEMENTWISE(extern, Dtype::float16)

namespace {

template <class Pass>
void launch_for(const Activation& activation, const Pass& pass, cudaStream_t stream) {
  switch (activation.dtype) {
    case Dtype::float64:
      return launch_of<Dtype::float64>(activation, pass, stream);
    case Dtype::float32:
      return launch_of<Dtype::float32>(activation, pass, stream);
    case Dtype::bfloat16:
      return launch_of<Dtype::bfloat16>(activation, pass, stream);
    case Dtype::float16:
      return launch_of<Dtype::float16>(activation, pass, stream);
  }
}

}  // namespace

void launch(const Activation& activation, const Value& value, cudaStream_t stream) {
  launch_for(activation, value, stream);
}

void launch(const Activation& activation, const CompressedValue& value, cudaStream_t stream) {
  launch_for(activation, value, stream);
}

void launch(const Activation& activation, const ChainRule& rule, cudaStream_t stream) {
  launch_for(activation, rule, stream);
}

void launch(const Activation& activation, const GatedChainRule& rule, cudaStream_t stream) {
  launch_for(activation, rule, stream);
}

cudaError_t find_kernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, column_sum_kernel<Dtype::float32>);
}

void launch_column_sum(Dtype dtype, const void* sums, void* out, int64_t strips, int64_t n, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::float64:
      return launch_column_sum_of<Dtype::float64>(sums, out, strips, n, stream);
    case Dtype::float32:
      return launch_column_sum_of<Dtype::float32>(sums, out, strips, n, stream);
    case Dtype::bfloat16:
      return launch_column_sum_of<Dtype::bfloat16>(sums, out, strips, n, stream);
    case Dtype::float16:
      return launch_column_sum_of<Dtype::float16>(sums, out, strips, n, stream);
  }
}

Strips strips_of(int64_t m, int64_t n, Dtype dtype, int processors) {
  constexpr int64_t step = kRowsAtOnce * kWarps, blocks_each = 4;  // of a multiprocessor, by registers
  const int64_t columns = kLanes * 16 / kItemSize[static_cast<int>(dtype)];
  const int64_t wanted = std::max<int64_t>(1, blocks_each * processors / ((n + columns - 1) / columns));
  const int64_t each = (std::max<int64_t>(m, 1) + wanted - 1) / wanted, rows = (each + step - 1) / step * step;
  return {rows, std::max<int64_t>(1, (m + rows - 1) / rows)};
}

}  // namespace fastbp::cuda
