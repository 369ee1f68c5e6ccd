// The loops of the compressed save policies for one capability, see kernels.h; what they write and read is in
// fastbp/compression.py. Rows are of the call's dtype T, or of float with numbers that T has.
//
// A row is taken in stretches of float that stay in the first cache: read, computed, written. So an activation is
// compiled once for a compute type, and what depends on the rows and on what is kept does not know the activation.
#include "fp8.h"
#include "math.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

constexpr int kStretch = 576, kSets = kStretch / kLanes;
constexpr int kPair = 2 * kLanes;  // a stretch is filled up with zeros to whole pairs of registers
static_assert(kStretch % kPair == 0);

// f on registers, four side by side and then pairs.
template <class F>
HD void each_register(int64_t n, const float* from, float* to, const F& f) {
  const auto step = [&]<int count>(std::integral_constant<int, count>, int64_t i) {
    Vec<float> found[count];
    FASTBP_UNROLL for (int j = 0; j < count; ++j) found[j] = f(Vec<float>::load(from + i + j * kLanes));
    FASTBP_UNROLL for (int j = 0; j < count; ++j) found[j].store(to + i + j * kLanes);
  };
  constexpr int side = 4;
  int64_t i = 0;
  for (; i + side * kLanes <= n; i += side * kLanes) step(std::integral_constant<int, side>{}, i);
  for (; i < n; i += kPair) step(std::integral_constant<int, 2>{}, i);
}

template <class A, class S>
static void values(int64_t n, const float* z, float* y) {
  each_register(n, z, y, [](Vec<float> x) { return Vec<float>(A::value(Vec<S>(x.v)).v); });
}

// Zeros after the first n numbers, up to a whole pair of registers.
HD void fill_up(int64_t n, float* numbers) {
  if (n % kPair) FASTBP_UNROLL for (int j = 0; j < 2; ++j) Vec<float>(0.0f).store(numbers + n + j * kLanes);
}

// The slope on one side of the minimum, in the place of y: with a side that the compiler sees, half of the formula is
// gone.
template <class A, class S, bool right>
static void slopes(int64_t n, float* y) {
  each_register(n, y, y, [](Vec<float> y) {
    const Vec<S> one(1.0f), side(right ? 1.0f : 0.0f);
    if constexpr (std::is_same_v<S, Coarse>) {
      return Vec<float>(A::grad_from_side_16(one, Vec<S>(y.v), side).v);
    } else {
      return A::grad_from_side(one, y, side);
    }
  });
}

// An activation, for rows of one dtype: what it is computed by, where its minimum is, and the least y that is read
// back.
struct Sided {
  void (*values)(int64_t n, const float* z, float* y);
  void (*right_slopes)(int64_t n, float* y);
  void (*left_slopes)(int64_t n, float* y);
  float minimum_at, least_of_bits, least_marked;
};

// f(register, where it begins in the row) for all n numbers of a stretch; the last ones are read and written alone.
template <class F>
HD void for_registers(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<bool, true>{}, kLanes);
  if (i < n) f(i, std::integral_constant<bool, false>{}, static_cast<int>(n - i));
}

template <class Row, bool whole>
HD Vec<float> read(const Row* from, int n) {
  if constexpr (whole) return load<Row, float>(from);
  return load<Row, float>(from, n);
}
template <class Row, bool whole>
HD void write(Vec<float> x, Row* to, int n) {
  if constexpr (whole) return store<Row, float>(x, to);
  return store<Row, float>(x, to, n);
}

// y as T has it with its code, or with the side in its lowest bit.
template <class T, bool in_bits>
HD Vec<float> marked(Vec<float> wide, Bits32 right, Bits32& code) {
  constexpr int spare = kSpare<T>;
  if constexpr (in_bits) {
    const Vec<float> y = rounded<T>(wide);
    code = right & 8;
    if constexpr (spare > 0) {
      const Bits32 beyond = (wide.bits() - y.bits() + (1 << (spare - 1))) >> (spare - 3);
      const Bits32 steps = beyond < 0 ? Bits32{} : beyond;
      code |= steps > 7 ? Bits32{} + 7 : steps;
    }
    return y;
  } else {
    const Bits32 whole = to_bits<T>(wide);
    const Vec<float> y = from_bits<T>(whole), zero(0.0f);
    // Zero has the sign of its side, and so has what f should not have put above it on the left.
    const Bits32 same = (y >= zero).m ? Vec<float>(right ? (y + zero).v : (-zero).v).bits() : y.bits();
    return Vec<float>::of((y < zero).m ? from_bits<T>((whole & ~1) | (right & 1)).bits() : same);
  }
}

// What the next stretch reads comes into the first cache while this one is computed: the loads of a stretch stand
// together, with nothing beside them to wait for.
template <class Row>
HD void fetch_next(const Row* at) {
  __builtin_prefetch(at + kStretch);
}

template <class T, class Row, bool in_bits>
[[gnu::noinline, gnu::noclone]] static void value_of(const Sided& activation, int64_t n, const Row* z, Row* y,
                                                     uint8_t* bits) {
  float wide[kStretch + kPair];
  for (int64_t begin = 0; begin < n; begin += kStretch, z += kStretch, y += kStretch) {
    const int64_t count = n - begin < kStretch ? n - begin : kStretch;
    const float* from = wide;
    if (std::is_same_v<Row, float> && count % kPair == 0) {
      from = reinterpret_cast<const float*>(z);
    } else {
      for_registers(count, [&](int64_t i, auto whole, int some) { read<Row, whole>(z + i, some).store(wide + i); });
      fill_up(count, wide);
    }
    activation.values(count, from, wide);
    for_registers(count, [&](int64_t i, auto whole, int some) {
      const Bits32 right = (read<Row, whole>(z + i, some) >= Vec<float>(activation.minimum_at)).m;
      fetch_next(z + i);
      Bits32 code;
      write<Row, whole>(marked<T, in_bits>(Vec<float>::load(wide + i), right, code), y + i, some);
      if constexpr (in_bits) store_halves(code, bits + (begin + i) / 2, some);
    });
  }
}

// The left side takes more work than the right and has fewer numbers, so they are put next to one another for it.
template <class T, class Row, bool in_bits>
[[gnu::noinline, gnu::noclone]] static void grad_of(const Sided& activation, int64_t n, const Row* dy, const Row* y,
                                                    const uint8_t* bits, Row* dz) {
  constexpr int spare = kSpare<T>;
  const Vec<float> least(in_bits ? activation.least_of_bits : activation.least_marked);
  float wide[kStretch + kPair], apart[kStretch + kPair];
  uint32_t lefts[kSets];
  for (int64_t begin = 0; begin < n; begin += kStretch, dy += kStretch, y += kStretch, dz += kStretch) {
    const int64_t count = n - begin < kStretch ? n - begin : kStretch;
    int64_t left = 0;
    for_registers(count, [&](int64_t i, auto whole, int some) {
      Vec<float> numbers = read<Row, whole>(y + i, some);
      fetch_next(y + i);
      fetch_next(dy + i);
      Bits32 right;  // in the highest bit
      if constexpr (in_bits) {
        const Bits32 code = load_halves(bits + (begin + i) / 2, some);
        right = code << 28;
        if constexpr (spare > 0) {
          constexpr int32_t middle = (1 << (spare - 4)) - (1 << (spare - 1));
          numbers = Vec<float>::of(numbers.bits() + ((code & 7) << (spare - 3)) + middle);
        }
      } else {
        right = ~numbers.bits() | to_bits<T>(numbers) << 31;
      }
      numbers = greater(numbers, least);
      numbers.store(wide + i);
      const uint32_t set = ~high_bits(right) & ((uint32_t{1} << some) - 1);
      store_together(numbers, set, apart + left);
      left += __builtin_popcount(set);
      lefts[i / kLanes] = set;
    });
    fill_up(count, wide);
    fill_up(left, apart);
    activation.right_slopes(count, wide);
    activation.left_slopes(left, apart);
    left = 0;
    for_registers(count, [&](int64_t i, auto whole, int some) {
      const uint32_t set = lefts[i / kLanes];
      const Vec<float> slope = put_back(Vec<float>::load(wide + i), set, apart + left);
      left += __builtin_popcount(set);
      write<Row, whole>(read<Row, whole>(dy + i, some) * slope, dz + i, some);
    });
  }
}

// `Values` is what f is computed in, so that y is what the other policies have; `Slopes` what the slope is.
template <class A, class T, class Values, class Slopes>
static constexpr Sided kSided = {
    values<A, Values>,
    slopes<A, Slopes, true>,
    slopes<A, Slopes, false>,
    static_cast<float>(A::minimum_at),
    static_cast<float>(floor_of(A::lowest, kDtypeOf<T>, true)),
    static_cast<float>(floor_of(A::lowest, kDtypeOf<T>, false)),
};

template <class T, class Row, const Sided& activation>
static void value(int64_t n, const void* z, void* y, uint8_t* bits) {
  const auto* from = static_cast<const Row*>(z);
  auto* to = static_cast<Row*>(y);
  bits ? value_of<T, Row, true>(activation, n, from, to, bits)
       : value_of<T, Row, false>(activation, n, from, to, nullptr);
}

template <class T, class Row, const Sided& activation>
static void grad(int64_t n, const void* dy, const void* y, const uint8_t* bits, void* dz) {
  const auto *d = static_cast<const Row*>(dy), *from = static_cast<const Row*>(y);
  auto* to = static_cast<Row*>(dz);
  bits ? grad_of<T, Row, true>(activation, n, d, from, bits, to)
       : grad_of<T, Row, false>(activation, n, d, from, nullptr, to);
}

template <class T, class Values, class Slopes, class Row>
static Compressed loops() {
  Compressed t{};
  const auto fill = [&]<class A>(A, int i) {
    if constexpr (A::has_grad_from_side) {
      t.value[i] = value<T, Row, kSided<A, T, Values, Slopes>>;
      t.grad[i] = grad<T, Row, kSided<A, T, Values, Slopes>>;
    }
  };
  int i = 0;
#define FASTBP_ROW(A) fill(act::A{}, i++);
  FASTBP_FOR_EACH_ACTIVATION(FASTBP_ROW)
#undef FASTBP_ROW
  t.encode = encode_fp8<T, Row>;
  t.decode = decode_fp8<T, Row>;
  return t;
}

void fill_compressed(Kernels<float>& t);
void fill_compressed(Kernels<float>& t) {
  constexpr int float32 = static_cast<int>(Dtype::float32);
  constexpr int bfloat16 = static_cast<int>(Dtype::bfloat16), float16 = static_cast<int>(Dtype::float16);
  t.compressed[float32] = t.rounded[float32] = loops<float, float, float, float>();
  t.compressed[bfloat16] = loops<BFloat16, Coarse, Coarse, BFloat16>();
  t.compressed[float16] = loops<Half, Coarse, Coarse, Half>();
  t.rounded[bfloat16] = loops<BFloat16, float, Coarse, float>();
  t.rounded[float16] = loops<Half, float, Coarse, float>();
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
