// The kernel of a product, chosen; the kernels themselves are compiled in a file for each kind.
#include "hopper_launch.cuh"

namespace fastbp::cuda {

FASTBP_PRODUCT(extern, forward)
FASTBP_PRODUCT(extern, gated_forward)
FASTBP_PRODUCT(extern, dgrad)
FASTBP_PRODUCT(extern, gated_dgrad)

CUtensorMap map_of(const Operand& matrix, Dtype dtype, uint32_t box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &state));
    return state == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  check(encode != nullptr, "the driver does not know cuTensorMapEncodeTiled, which is CUDA 12's; update it");
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[] = {kDepth, box_rows}, steps[] = {1, 1};
  const CUtensorMapDataType type =
      dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "the driver refuses to describe an operand of a fused product");
  return map;
}

namespace {

// The kernel counts rows and columns in int, up to the end of a cluster's last tiles.
constexpr int64_t kMost = INT32_MAX - 2 * kTile;

bool describable(const Operand& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride % 8 == 0 && matrix.stride > 0 &&
         matrix.rows <= kMost && matrix.columns <= kMost;
}

template <Dtype D>
void launch_of_dtype(const Activation& activation, const Product& product, int processors, cudaStream_t stream) {
  switch (product.kind) {
    case Product::forward:
      return launch_product_as<D, Product::forward>(activation, product, processors, stream);
    case Product::gated_forward:
      return launch_product_as<D, Product::gated_forward>(activation, product, processors, stream);
    case Product::dgrad:
      return launch_product_as<D, Product::dgrad>(activation, product, processors, stream);
    case Product::gated_dgrad:
      return launch_product_as<D, Product::gated_dgrad>(activation, product, processors, stream);
  }
}

}  // namespace

const char* product_refusal(const Product& product, Dtype dtype, int capability) {
  if (capability != 90) return "fused products are written for compute capability 9.0";
  if (dtype != Dtype::bfloat16 && dtype != Dtype::float16) return "fused products are for bfloat16 and float16";
  if (product.m == 0 || product.n == 0 || product.k == 0) return "a size is 0";
  if (product.n % 8 != 0) return "the rows of a result do not begin at 16 bytes";
  const int64_t tiles = (product.m + 2 * kTile - 1) / (2 * kTile) * ((product.n + kTile / 2 - 1) / (kTile / 2));
  if (tiles > INT32_MAX / 2) return "there are more tiles than an int counts";
  const bool two = product.kind == Product::gated_forward;
  if (!describable(product.a) || !describable(product.b) || (two && !describable(product.b2))) {
    return "the rows of an operand do not begin at 16 bytes";
  }
  return nullptr;
}

void launch_product(const Activation& activation, const Product& product, int processors, cudaStream_t stream) {
  if (activation.dtype == Dtype::bfloat16) {
    launch_of_dtype<Dtype::bfloat16>(activation, product, processors, stream);
  } else {
    launch_of_dtype<Dtype::float16>(activation, product, processors, stream);
  }
}

}  // namespace fastbp::cuda
