// The loops of the compressed save policies for one capability, see kernels.h; what they write and read is in
// fastbp/compression.py. Rows are of the call's dtype T, or of float with numbers that T has.
#include "fp8.h"
#include "math.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

// y = f(z) as T has it, and its bits; or with the side in its lowest bit.
template <class A, class T, class S, bool in_bits>
HD Vec<float> marked(Vec<S> z, Bits32& code) {
  constexpr int spare = kSpare<T>;
  const Vec<float> wide(A::value(z).v);
  const Bits32 right = (z >= Vec<S>(static_cast<float>(A::minimum_at))).m;
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
    const Bits32 side = (whole & ~1) | (right & 1), same = whole & ~(right & (y == zero).m);  // right: -0 becomes 0
    return from_bits<T>((y < zero).m ? side : same);
  }
}

template <class A, class T, class S, class Row, bool in_bits>
static void value_of(int64_t n, const Row* z, Row* y, uint8_t* bits) {
  constexpr int size = Vec<S>::size, side = 4;
  int64_t i = 0;
  for (; i + side * size <= n; i += side * size) {
    Vec<float> results[side];
    Bits32 codes[side];
    FASTBP_UNROLL for (int j = 0; j < side; ++j) {
      results[j] = marked<A, T, S, in_bits>(load<Row, S>(z + i + j * size), codes[j]);
    }
    FASTBP_UNROLL for (int j = 0; j < side; ++j) {
      store<Row, float>(results[j], y + i + j * size);
      if constexpr (in_bits) store_halves(codes[j], bits + (i + j * size) / 2);
    }
  }
  for (; i < n; i += size) {
    const int64_t count = n - i < size ? n - i : size;
    Bits32 codes;
    const Vec<float> result = marked<A, T, S, in_bits>(load<Row, S>(z + i, count), codes);
    store<Row, float>(result, y + i, count);
    if constexpr (in_bits) store_halves(codes, bits + i / 2, count);
  }
}

// The least y that is read back: compression.floor.
template <class A, class T, bool in_bits>
constexpr float least() {
  double unit = 1.0 / (1 << 24) * (1 << kSpare<T>), power = 1;
  static_assert(A::lowest < 0 && A::lowest > -1);
  while (power / 2 > -A::lowest) power /= 2;
  return static_cast<float>(A::lowest + (in_bits ? 1.0 / 80 : 1.0 / 5) * power * unit);
}

// What the slope is computed from: y, and a lane's highest bit where z is not left of the minimum.
template <class A, class T, class S, class Row, bool in_bits>
struct Sided {
  const Row* y;
  const uint8_t* bits;

  HD Vec<S> read(int64_t i, Bits32& right) const {
    return decoded(load<Row, float>(y + i), in_bits ? load_halves(bits + i / 2) : Bits32{}, right);
  }
  HD Vec<S> read(int64_t i, int64_t n, Bits32& right) const {
    return decoded(load<Row, float>(y + i, n), in_bits ? load_halves(bits + i / 2, n) : Bits32{}, right);
  }

 private:
  static HD Vec<S> decoded(Vec<float> y, Bits32 code, Bits32& right) {
    constexpr int spare = kSpare<T>;
    if constexpr (!in_bits) {
      right = ~y.bits() | to_bits<T>(y) << 31;
    } else {
      right = code << 28;
      if constexpr (spare > 0) {
        constexpr int32_t middle = (1 << (spare - 4)) - (1 << (spare - 1));
        y = Vec<float>::of(y.bits() + ((code & 7) << (spare - 3)) + middle);
      }
    }
    return Vec<S>(greater(y, Vec<float>(least<A, T, in_bits>())).v);
  }
};

// The slope on one side of the minimum: with a side that the compiler sees, half of the formula is gone.
template <class A, class S>
HD Vec<S> slope(Vec<S> y, bool right) {
  const Vec<S> one(1.0f), side(right ? 1.0f : 0.0f);
  if constexpr (std::is_same_v<S, Coarse>) {
    return A::grad_from_side_16(one, y, side);
  } else {
    return A::grad_from_side(one, y, side);
  }
}

// The left side takes more work than the right and has fewer numbers: those of a stretch are put next to one another.
template <class A, class T, class S, class Row, bool in_bits>
static void grad_of(int64_t n, const Row* dy, const Row* y, const uint8_t* bits, Row* dz) {
  constexpr int size = Vec<S>::size, side = 6, few = 4, stretch = 576;
  float lefts[stretch + few * size];
  uint32_t sets[stretch / size];
  for (int64_t begin = 0; begin < n; begin += stretch) {
    const int64_t rest = n - begin < stretch ? n - begin : stretch;
    const Sided<A, T, S, Row, in_bits> kept{y + begin, bits + begin / 2};
    Bits32 right;
    int64_t count = 0, i = 0;
    const auto put = [&](Vec<S> numbers, uint32_t set) {
      store_together(Vec<float>(numbers.v), set, lefts + count);
      sets[i / size] = set;
      count += __builtin_popcount(set);
    };
    constexpr uint32_t all = (uint32_t{1} << size) - 1;
    for (; i + size <= rest; i += size) {
      const Vec<S> numbers = kept.read(i, right);
      put(numbers, ~high_bits(right) & all);
    }
    if (i < rest) {
      const Vec<S> numbers = kept.read(i, rest - i, right);
      put(numbers, ~high_bits(right) & Vec<S>::first(rest - i));
    }
    FASTBP_UNROLL for (int j = 0; j < few; ++j) Vec<float>(0.0f).store(lefts + count + j * size);
    for (i = 0; i < count; i += few * size) {
      Vec<S> found[few];
      FASTBP_UNROLL for (int j = 0; j < few; ++j) found[j] = slope<A, S>(Vec<S>::load(lefts + i + j * size), false);
      FASTBP_UNROLL for (int j = 0; j < few; ++j) found[j].store(lefts + i + j * size);
    }
    count = 0;
    const auto take = [&](Vec<S> numbers, Bits32 right, Vec<S> d) {
      const uint32_t set = sets[i / size];
      const Vec<S> left(load_apart(lefts + count, set).v);
      count += __builtin_popcount(set);
      return d * Vec<S>(right < 0 ? slope<A, S>(numbers, true).v : left.v);
    };
    for (i = 0; i + side * size <= rest; i += side * size) {
      const int64_t first = i;
      Vec<S> found[side];
      FASTBP_UNROLL for (int j = 0; j < side; ++j) {
        i = first + j * size;
        const Vec<S> numbers = kept.read(i, right);
        found[j] = take(numbers, right, load<Row, S>(dy + begin + i));
      }
      i = first;
      FASTBP_UNROLL for (int j = 0; j < side; ++j) store<Row, S>(found[j], dz + begin + i + j * size);
    }
    for (; i < rest; i += size) {
      const int64_t some = rest - i < size ? rest - i : size;
      const Vec<S> numbers = kept.read(i, some, right);
      store<Row, S>(take(numbers, right, load<Row, S>(dy + begin + i, some)), dz + begin + i, some);
    }
  }
}

template <class A, class T, class S, class Row>
static void value(int64_t n, const void* z, void* y, uint8_t* bits) {
  const auto* from = static_cast<const Row*>(z);
  auto* to = static_cast<Row*>(y);
  bits ? value_of<A, T, S, Row, true>(n, from, to, bits) : value_of<A, T, S, Row, false>(n, from, to, bits);
}

template <class A, class T, class S, class Row>
static void grad(int64_t n, const void* dy, const void* y, const uint8_t* bits, void* dz) {
  const auto *d = static_cast<const Row*>(dy), *from = static_cast<const Row*>(y);
  auto* to = static_cast<Row*>(dz);
  bits ? grad_of<A, T, S, Row, true>(n, d, from, bits, to) : grad_of<A, T, S, Row, false>(n, d, from, bits, to);
}

// `Values` is what f is computed in, so that y is what the other policies have; `Slopes` what the slope is.
template <class T, class Values, class Slopes, class Row>
static Compressed loops() {
  Compressed t{};
  const auto fill = [&]<class A>(A, int i) {
    if constexpr (A::has_grad_from_side) {
      t.value[i] = value<A, T, Values, Row>;
      t.grad[i] = grad<A, T, Slopes, Row>;
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
