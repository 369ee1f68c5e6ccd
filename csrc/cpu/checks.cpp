#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string_view>

#include "../activations.h"
#include "needs.h"

namespace fastbp::cpu {

namespace {

#define FASTBP_COUNT(A) +1
constexpr int kActivations = FASTBP_FOR_EACH_ACTIVATION(FASTBP_COUNT);
static_assert(kActivations <= kMostActivations);
constexpr int64_t kOverwrites = 32 * kMostActivations;  // in a call's settings, see ops.cpp
constexpr int64_t kRoute = 2 * kOverwrites;
constexpr int64_t kGiven = 8 * kRoute;
static_assert(kRoute == 4096 && kMostRoutes < 8);  // as ops.cpp and the Python side have it
#define FASTBP_NAME(A) " " #A
static_assert(
    std::string_view(FASTBP_FOR_EACH_ACTIVATION(FASTBP_NAME)).starts_with(" identity "));  // see check_complete

#define FASTBP_HAS_SIDE(A) act::A::has_grad_from_side,
constexpr bool kHasSide[] = {FASTBP_FOR_EACH_ACTIVATION(FASTBP_HAS_SIDE)};

}  // namespace

// Every tensor that reaches a pointer passes here: the Python side has said it better, but an op can be called alone.
void check(const Tensor& tensor, const Call& call, const char* name) {
  STD_TORCH_CHECK(device_of(tensor) == call.device, "fastbp_native: ", name, " must be on the device of the others");
  STD_TORCH_CHECK(tensor.dim() > 0, "fastbp_native: ", name, " must have a dimension");
  STD_TORCH_CHECK(dtype_of(tensor) == call.dtype, "fastbp_native: ", name, " must have the dtype of the other tensors");
}

Call make_call(const Tensor& data, int64_t linears, int64_t settings, const std::vector<double>& params) {
  const bool given = (settings & kGiven) != 0;
  settings &= ~kGiven;
  const int64_t save = settings >> 2 & 7, activation = (settings & (kOverwrites - 1)) >> 5;
  STD_TORCH_CHECK(linears > 0 && settings >= 0 && activation < kActivations && params.size() <= 2 && save < kSaves,
                  "fastbp_native: no such call");
  const bool overwrites = (settings & kOverwrites) != 0;
  STD_TORCH_CHECK(!(overwrites && (save != 0 || given)), "fastbp_native: only z of the call may be written over");
  const int64_t route = settings / kRoute;
  STD_TORCH_CHECK(route <= kMostRoutes, "fastbp_native: no such route");
  Call call;
  call.settings = {
      (settings & 1) != 0, (settings & 2) != 0,    given, static_cast<int>(activation), {0, 0}, static_cast<Save>(save),
      overwrites,          static_cast<int>(route)};
  for (size_t i = 0; i < params.size(); ++i) call.settings.params[i] = params[i];
  STD_TORCH_CHECK(
      call.settings.gated ? linears == 2 + call.settings.projected : call.settings.projected || linears == 1,
      "fastbp_native: this form does not have ", linears, " linears");
  STD_TORCH_CHECK(!given || (linears == call.width() + 1 && call.settings.save != Save::recompute),
                  "fastbp_native: what is given has one linear after it, and nothing to be made again from");
  STD_TORCH_CHECK(!call.settings.from_side() || (!call.settings.gated && kHasSide[activation]),
                  "fastbp_native: the output of this call and one side of a minimum do not determine its slope");
  call.dtype = dtype_of(data);
  STD_TORCH_CHECK(!call.settings.compressed() || call.dtype != Dtype::float64,
                  "fastbp_native: compressed policies do not serve float64");
  call.device = device_of(data);
  check(data, call, "x or dy");
  const auto sizes = data.sizes();
  call.leading.assign(sizes.begin(), sizes.end() - 1);
  call.rows = 1;
  for (int64_t size : call.leading) call.rows *= size;
  call.weights.resize(linears);
  return call;
}

namespace {

Weight weight_of(const Tensor& tensor, const Call& call) {
  check(tensor, call, "weight");
  STD_TORCH_CHECK(tensor.dim() == 2, "fastbp_native: weight must be a matrix");
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return {true, tensor.const_data_ptr(), call.dtype, sizes[0], sizes[1], strides[0], strides[1]};
}

// How many tensors before the weights a call has, the first of them x; and how many linears of its it does not have.
struct Shape {
  explicit Shape(int64_t settings)
      : given((settings & kGiven) != 0), inputs(given ? width(settings) : 1), missing(given ? width(settings) : 0) {}
  static int64_t width(int64_t settings) { return 1 + (settings & 1); }
  const bool given;
  const int64_t inputs, missing;
};

void check_bias(const Maybe& bias, const Weight& weight, const Call& call) {
  if (!bias) return;
  check(*bias, call, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && (!weight.any || bias->size(0) == weight.out),
                  "fastbp_native: bias must have as many numbers as its weight has rows");
}

// Rows of a saved tensor, of which there must be as many as the call has.
Rows rows_of(const Tensor& tensor, const Call& call, const char* name) {
  check(tensor, call, name);
  Rows rows(tensor);
  STD_TORCH_CHECK(rows.count == call.rows, "fastbp_native: ", name, " has ", rows.count, " rows and not ", call.rows);
  return rows;
}

// What a compressed policy kept; it is read where it lies next to one another.
Bytes bytes_of(const Maybe& tensor, const Call& call) {
  if (!tensor) return Bytes();
  STD_TORCH_CHECK(device_of(*tensor) == call.device, "fastbp_native: a residual must be on the device of the others");
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor->get(), &dtype));
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_uint8() && tensor->dim() > 0,
                  "fastbp_native: what a compressed policy keeps must be rows of uint8");
  const auto sizes = tensor->sizes();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  STD_TORCH_CHECK(rows == call.rows, "fastbp_native: a residual has ", rows, " rows and not ", call.rows);
  return Bytes(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
}

// The residuals of `saved`, in the order of saving.find_residuals; what is given is one where no policy kept less.
void take_residuals(Call& call, const std::vector<Tensor>& saved) {
  const Settings& settings = call.settings;
  const bool inputs = settings.given && settings.save == Save::preact;
  size_t place = inputs ? 0 : 1 + call.inputs() + 2 * (call.linears() - call.given());
  const auto next = [&] { return place < saved.size() ? if_any(saved[place++]) : Maybe(); };
  for (int64_t i = 0; i < call.hidden() * call.width(); ++i) {
    if (settings.keeps_fp8()) {
      call.codes.push_back(bytes_of(next(), call));
      call.scales.push_back(bytes_of(next(), call));
      const Bytes& codes = call.codes.back();
      call.residuals.push_back(codes ? Rows(codes, call.scales.back(), call.rows, call.dtype) : Rows());
      call.kept.emplace_back();
      continue;
    }
    Maybe residual = settings.from_output() && !settings.projected ? if_any(saved[1]) : next();
    call.residuals.push_back(residual ? rows_of(*residual, call, "residual") : Rows());
    call.kept.push_back(std::move(residual));
    if (settings.keeps_bits()) call.bits.push_back(bytes_of(next(), call));
  }
}

// What a call is given: the pre-activations of its hidden layer, all of one shape.
void take_given(Call& call, const Tensor& first, const std::vector<Tensor>& others) {
  const auto sizes = first.sizes();
  for (int part = 0; part < call.width(); ++part) {
    const Tensor& z = part == 0 ? first : others[part - 1];
    const auto own = z.sizes();
    STD_TORCH_CHECK(own.size() == sizes.size() && std::equal(own.begin(), own.end(), sizes.begin()),
                    "fastbp_native: gate and up must have one shape");
    check(z, call, "gate or up");
    call.keep(z);
    call.weights[part].out = sizes.back();
  }
  call.biases.resize(call.given());
}

// A weight that backward does not read is not there, and its sizes follow from what lies around it.
void infer_sizes(Call& call, int64_t last) {
  for (int64_t layer = call.layers() - 1; layer >= 0; --layer) {  // above each layer lies one whose input is known
    const int64_t first = call.first(layer), above = first + call.parts(layer);
    int64_t out = layer == call.layers() - 1 ? last : call.weights[above].any ? call.weights[above].in : 0;
    for (int64_t i = first; i < above; ++i) {
      if (call.biases[i]) out = call.biases[i]->size(0);
      if (layer < call.hidden() && !call.residuals.empty() && call.residuals[i].any()) out = call.residuals[i].size;
      if (call.weights[i].any) out = call.weights[i].out;
    }
    for (int64_t i = first; i < above; ++i) call.weights[i].out = out;
  }
  for (int64_t layer = 0; layer < call.layers(); ++layer) {
    const int64_t first = call.first(layer);
    int64_t in = layer == 0 ? call.x.size : call.weights[call.first(layer - 1)].out;
    for (int64_t i = first; i < first + call.parts(layer); ++i) {
      if (call.weights[i].any) in = call.weights[i].in;
    }
    for (int64_t i = first; i < first + call.parts(layer); ++i) call.weights[i].in = in;
  }
}

// Whether the slopes of a hidden layer look at what one of its linears kept.
bool looks_at(const Call& call, const Needs& needs, int64_t linear) {
  if (call.settings.activation == 0 && call.settings.save == Save::output) return false;  // identity's do not
  if (!call.settings.gated) return needs.slope(linear);
  return needs.slope(0) || (linear == 0 && needs.slope(1));  // dg looks at g and u, du at g
}

// What was kept of a hidden linear, where the slopes of its layer look at it and where they do not.
void check_kept(const Call& call, int64_t linear, bool looked_at) {
  const int64_t n = call.weights[linear].out;
  const auto fits = [](int64_t size, int64_t wanted) {
    STD_TORCH_CHECK(size == wanted, "fastbp_native: a residual does not fit its weight");
  };
  const auto expect = [](bool there) {
    STD_TORCH_CHECK(there, "fastbp_native: a residual that backward reads is absent");
  };
  expect(call.residuals[linear].any() || !looked_at);
  if (call.residuals[linear].any()) fits(call.residuals[linear].size, n);
  if (call.settings.keeps_fp8() && call.codes[linear]) fits(call.scales[linear].size, scales_size(n));
  if (call.settings.keeps_bits()) {
    expect(bool(call.bits[linear]) || !looked_at);
    if (call.bits[linear]) fits(call.bits[linear].size, bits_size(n));
  }
}

// What backward is going to read must be there and fit together; which of it that is, follows from the needs.
void check_complete(const Call& call, const std::vector<bool>& wanted, int64_t last) {
  const Needs needs(call, wanted);
  const auto expect = [](bool fine, const char* what) { STD_TORCH_CHECK(fine, "fastbp_native: ", what); };
  const bool replay = call.settings.save == Save::recompute;
  expect(!call.x.any() || call.x.size == call.weights[0].in, "x does not fit the first weight");
  expect(call.weights.back().out == last, "dy does not fit the last weight");
  for (int64_t layer = 0; layer < call.layers(); ++layer) {
    const int64_t first = call.first(layer);
    bool reads_input = false;
    for (int64_t i = first; i < first + call.parts(layer); ++i) {
      const Weight& w = call.weights[i];
      const int64_t into = layer == 0 ? w.in : call.weights[call.first(layer - 1)].out;
      expect(w.in == into && w.in == call.weights[first].in && w.out == call.weights[first].out,
             "the weights do not fit together");
      expect(w.any || !needs.below(layer), "a weight that backward reads is absent");
      reads_input = reads_input || needs.weight(i);
      if (replay || layer == call.hidden()) continue;
      check_kept(call, i, looks_at(call, needs, i));
    }
    if (!reads_input) continue;
    expect(layer > 0 || call.x.any(), "x, which backward reads, is absent");
    for (int64_t i = layer > 0 ? call.first(layer - 1) : first; i < first && !replay; ++i) {
      expect(call.residuals[i].any(), "a residual that backward reads is absent");
    }
  }
  for (int64_t i = 0; i < call.hidden() * call.width() && replay; ++i) {
    const int64_t above = call.first(call.layer_of(i) + 1);
    const bool reads = looks_at(call, needs, i) || (above < call.linears() && needs.weight(above));
    expect(call.replays(i) || !reads, "x or a weight that backward reads is absent");
  }
}

}  // namespace

std::vector<Tensor> weights_of(const Call& call, const std::vector<Tensor>& tensors) {
  const auto first = tensors.begin() + call.inputs() - 1;
  return {first, first + call.linears() - call.given()};
}

Call forward_call(const Tensor& x, const std::vector<Tensor>& tensors, int64_t settings,
                  const std::vector<double>& params) {
  const Shape shape(settings);
  const int64_t others = shape.inputs - 1, count = static_cast<int64_t>(tensors.size()) - others;
  STD_TORCH_CHECK(count > 0 && count % 2 == 0, "fastbp_native: a bias or none for each weight");
  const int64_t linears = shape.missing + count / 2;
  Call call = make_call(x, linears, settings, params);
  int64_t features = x.sizes().back();
  if (shape.given) {
    take_given(call, x, tensors);
  } else {
    call.x = Rows(x);
  }
  for (int64_t i = shape.missing; i < linears; ++i) {
    const int64_t place = others + i - shape.missing;
    Weight& weight = call.weights[i] = weight_of(tensors[place], call);
    STD_TORCH_CHECK(weight.in == features, "fastbp_native: weight ", i, " has ", weight.in, " columns and not ",
                    features);
    call.biases.push_back(if_any(tensors[place + count / 2]));
    check_bias(call.biases[i], weight, call);
    if (call.settings.gated && i == 1) {
      STD_TORCH_CHECK(weight.out == call.weights[0].out, "fastbp_native: gate and up differ");
    }
    if (!call.settings.gated || i == 1) features = weight.out;
  }
  return call;
}

Call backward_call(const Tensor& dy, const std::vector<Tensor>& saved, int64_t settings,
                   const std::vector<double>& params, const std::vector<bool>& needs, Maybe& x,
                   std::vector<Maybe>& weights) {
  const Shape shape(settings);
  const int64_t tensors = static_cast<int64_t>(needs.size()) - shape.inputs, own = tensors / 2;
  STD_TORCH_CHECK(tensors > 0 && tensors % 2 == 0 && static_cast<int64_t>(saved.size()) >= shape.inputs + 1 + tensors,
                  "fastbp_native: two needs, a weight or none and a bias or none for each linear");
  const int64_t linears = shape.missing + own;
  Call call = make_call(dy, linears, settings, params);
  if (!shape.given) x = if_any(saved[0]);
  if (x) call.x = rows_of(*x, call, "x");
  weights.resize(linears);
  call.biases.resize(linears);
  for (int64_t i = shape.missing; i < linears; ++i) {
    const int64_t place = shape.inputs + 1 + i - shape.missing;
    weights[i] = if_any(saved[place]);
    call.biases[i] = if_any(saved[place + own]);
    if (weights[i]) call.weights[i] = weight_of(*weights[i], call);
  }
  if (call.settings.save != Save::recompute) take_residuals(call, saved);
  infer_sizes(call, dy.sizes().back());
  for (int64_t i = 0; i < linears; ++i) check_bias(call.biases[i], call.weights[i], call);
  check_complete(call, needs, dy.sizes().back());
  return call;
}

std::vector<Tensor> only_needed(const std::vector<Maybe>& grads, const std::vector<bool>& needs) {
  std::vector<Tensor> found;
  for (size_t i = 0; i < needs.size(); ++i) {
    if (!needs[i]) continue;
    STD_TORCH_CHECK(grads[i].has_value(), "fastbp_native: a gradient that is needed was not found");
    found.push_back(*grads[i]);
  }
  return found;
}

}  // namespace fastbp::cpu
