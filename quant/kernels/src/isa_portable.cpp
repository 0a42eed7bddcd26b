// Portable C++: correct on every CPU, and plain enough loops for a compiler to turn into NEON.
#include <cmath>
#include <cstring>

#include "bf16.h"
#include "kernels.h"
#include "product.h"

namespace localmimo {
namespace {

struct Portable {
  struct F { float v[kLanes]; };
  struct Sum { int32_t v[kLanes]; };
  struct Step { int16_t v[kStepCodes]; };  // [row][4 columns]
  using Acts = const int16_t*;
  using Table = const int16_t*;
  static constexpr int kDirect = 1;
  static constexpr bool kPanels = true;
  static constexpr int kTile = 4;

  template <class Op>
  static LM_INLINE F each(Op op) {
    F out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = op(i);
    return out;
  }
  static LM_INLINE F zero() { return set1(0.0f); }
  static LM_INLINE F set1(float x) { return each([&](int) { return x; }); }
  static LM_INLINE F load(const float* p) { return each([&](int i) { return p[i]; }); }
  static LM_INLINE void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
  static LM_INLINE F add(const F& a, const F& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static LM_INLINE F sub(const F& a, const F& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static LM_INLINE F mul(const F& a, const F& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static LM_INLINE F div(const F& a, const F& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  static LM_INLINE F fma(const F& a, const F& b, const F& c) {
    return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static LM_INLINE F rint(const F& a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
  static LM_INLINE F maximum(const F& a, const F& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static LM_INLINE F seen(const F& score, float nothing, const F& weight) {  // zero where there was nothing
    return each([&](int i) { return score.v[i] != nothing ? weight.v[i] : 0.0f; });
  }
  static LM_INLINE F clamp(const F& a, float low, float high) {
    return each([&](int i) { return a.v[i] < low ? low : a.v[i] > high ? high : a.v[i]; });
  }
  static LM_INLINE F scale_by_power(const F& a, const F& n) {
    return each([&](int i) { return std::isnan(n.v[i]) ? n.v[i] : std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
  }

  static LM_INLINE Sum no_sum() { return {}; }
  static LM_INLINE Sum merge(const Sum& a, const Sum& b) {
    Sum s;
    for (int i = 0; i < kLanes; ++i)
      s.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
    return s;
  }
  static LM_INLINE F to_float(const Sum& s) {
    return each([&](int i) { return static_cast<float>(s.v[i]); });
  }
  static LM_INLINE Table table(const int16_t* book) { return book; }
  static LM_INLINE void look_up(const uint8_t* p, const Table& t, Step& low, Step& high) {
    for (int i = 0; i < kStepCodes; ++i) {
      low.v[i] = t[p[i] & 15];
      high.v[i] = t[p[i] >> 4];
    }
  }
  static LM_INLINE Step widen(const uint8_t* p) {
    Step s;
    for (int i = 0; i < kStepCodes; ++i) s.v[i] = static_cast<int8_t>(p[i]);
    return s;
  }
  static LM_INLINE void save(int16_t* p, const Step& s) { std::memcpy(p, s.v, sizeof s.v); }
  static LM_INLINE Step saved(const int16_t* p) {
    Step s;
    std::memcpy(s.v, p, sizeof s.v);
    return s;
  }
  static LM_INLINE Acts acts(const int16_t* p) { return p; }
  static LM_INLINE void mac(Sum& s, const Step& w, Acts a) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < 4; ++j) {  // unsigned: activations that are not finite may wrap around
        const uint32_t product = static_cast<uint32_t>(static_cast<int32_t>(w.v[4 * i + j]) * a[j]);
        s.v[i] = static_cast<int32_t>(static_cast<uint32_t>(s.v[i]) + product);
      }
  }
  template <int64_t bytes, int64_t every = 64, bool near = false>
  static LM_INLINE void prefetch(const uint8_t*) {}

  // Half precision without infinities and NaN, which no scale holds.
  static LM_INLINE float half_value(uint32_t h) {
    const int exponent = static_cast<int>((h >> 10) & 31);
    const int mantissa = static_cast<int>(h & 1023);
    const float size = exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                                : std::ldexp(static_cast<float>(mantissa), -24);
    return (h >> 15) & 1 ? -size : size;
  }
  static LM_INLINE F e4m3(const uint8_t* p) {
    return each([&](int i) { return half_value(((p[i] & 0x80u) << 8) | ((p[i] & 0x7fu) << 7)); });
  }
  static LM_INLINE F e8m0(const uint8_t* p) {
    return each([&](int i) { return std::ldexp(1.0f, p[i] - 127); });
  }
  static LM_INLINE F half(const uint8_t* p) {
    return each([&](int i) { return half_value(p[2 * i] | (p[2 * i + 1] << 8)); });
  }

  static constexpr int kDotRows = 1, kKeyRows = 4, kSums = 4;
  using ByPairs = TwoSteps<Portable>;
  static LM_INLINE F widen_bf16(const uint8_t* p) {
    return each([&](int i) { return from_bf16(static_cast<uint16_t>(p[2 * i] | (p[2 * i + 1] << 8))); });
  }
  static LM_INLINE F nearest_bf16(const F& x) {
    return each([&](int i) { return from_bf16(to_bf16(x.v[i])); });
  }
  struct ByQuads {
    struct Cell { int8_t v[kLanes][4]; };
    using Right = const Cell*;
    using Sum = Portable::Sum;
    static LM_INLINE Sum none() { return {}; }
    static LM_INLINE Sum less(Sum a, const int32_t* b) {
      for (int i = 0; i < kLanes; ++i) a.v[i] -= b[i];
      return a;
    }
    static LM_INLINE F to_float(const Sum& a) { return Portable::to_float(a); }
    static LM_INLINE Right right(const Cell& c) { return &c; }
    template <int64_t apart>
    static LM_INLINE Sum add(Sum sum, const float* l, Right r) {
      uint8_t four[4];
      std::memcpy(four, l, sizeof four);
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j) sum.v[i] += four[j] * r->v[i][j];
      return sum;
    }
    static LM_INLINE void weights(const F* p, float* out) {
      uint8_t* const to = reinterpret_cast<uint8_t*>(out);
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j) to[4 * i + j] = byte_of(p[j].v[i]);
    }
    // As a vector's conversion and saturation have it: lanes that nobody reads may hold anything.
    static LM_INLINE uint8_t byte_of(float x) {
      return x > 0 && x < 2147483648.0f ? static_cast<uint8_t>(std::nearbyint(x < 255.0f ? x : 255.0f)) : 0;
    }
    static LM_INLINE void value(const uint8_t* const* rows, Cell* out) {
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j) out->v[i][j] = static_cast<int8_t>(rows[j][i]);
    }
  };

  struct Word { uint64_t v[8]; };
  static LM_INLINE void exclusive_or(Word& sum, const uint8_t* p) {
    for (int i = 0; i < 8; ++i) {
      uint64_t word;
      std::memcpy(&word, p + 8 * i, 8);
      sum.v[i] ^= word;
    }
  }
  static LM_INLINE F gather(const float* table, const int32_t* at) {
    return each([&](int i) { return table[at[i]]; });
  }
  static LM_INLINE F gather16(const float* table, const int32_t* at) { return gather(table, at); }
  struct Finder {
    const Book& book;
    explicit Finder(const Book& b) : book(b) {}
    F rough(const F& ratio) const {
      return each([&](int i) { return book.rough[cell_of(book, ratio.v[i])]; });
    }
    void code(const F& ratio, int32_t* out) const {
      for (int i = 0; i < kLanes; ++i) out[i] = code_of(book, ratio.v[i]);
    }
  };

  static LM_INLINE float largest(const float* x) {
    uint32_t most = 0;
    for (int i = 0; i < kBlock; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float out;
    std::memcpy(&out, &most, 4);
    return out;
  }
  static LM_INLINE void round(const float* x, float inverse, int16_t* codes) {
    for (int i = 0; i < kBlock; ++i) {
      const float v = std::nearbyint(x[i] * inverse);
      codes[i] = std::isfinite(v) ? static_cast<int16_t>(v) : int16_t{-32768};
    }
  }
};

constexpr Kernels kKernels = kernels_of<Portable>("portable");

}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace localmimo
