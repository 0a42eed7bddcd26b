// The Python bindings. Addresses come in as integers: `quant/kernels/__init__.py` has compared every
// tensor's type, size and layout with the codec before it hands out a pointer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "block.h"
#include "compute.h"
#include "crc32.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;
using namespace localmimo;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

Format format_of(int code) {
  if (code < 0 || code >= kFormats) throw nb::value_error("unknown format code");
  return static_cast<Format>(code);
}

Matrix matrix(int format, int64_t rows, int64_t cols, Address codes, Address scales, Address scale) {
  return {format_of(format), rows, cols, at<uint8_t>(codes), at<uint8_t>(scales), at<float>(scale)};
}

void check_range(const char* name, const int64_t* at, int64_t n, int64_t limit) {
  if (n == 0) return;
  const auto [low, high] = std::minmax_element(at, at + n);
  if (*low >= 0 && *high < limit) return;
  throw nb::value_error((std::string(name) + " name rows " + std::to_string(*low) + " to " + std::to_string(*high) +
                         "; rows 0 to " + std::to_string(limit - 1) + " exist.")
                            .c_str());
}

void check_apart(const int64_t* at, int64_t n, int64_t limit) {
  std::vector<bool> taken(static_cast<size_t>(limit));
  for (int64_t i = 0; i < n; ++i) {
    if (taken[static_cast<size_t>(at[i])])
      throw nb::value_error("Two outputs name the same row of out; each needs its own.");
    taken[static_cast<size_t>(at[i])] = true;
  }
}

// A matrix whose parts Python has checked once; it keeps them alive for as long as this lives.
struct PyMatrix {
  Matrix w;
  PyMatrix(int format, int64_t rows, int64_t cols, Address codes, Address scales, Address scale)
      : w(matrix(format, rows, cols, codes, scales, scale)) {}

  void multiply(Address x, bool half, int64_t n, Address y) const {
    nb::gil_scoped_release release;
    linear(w, at<void>(x), half, n, at<void>(y));
  }
};

// What the experts of one page layout need of it. offsets: codes, scales, scale (-1: none) of gate, up and down.
struct PyExperts {
  PageShape shape;
  PyExperts(int format, int64_t hidden, int64_t inner, const std::vector<int64_t>& o) {
    if (o.size() != 9) throw nb::value_error("an expert page has nine part offsets");
    shape = {format_of(format), hidden, inner, {o[0], o[1], o[2]}, {o[3], o[4], o[5]}, {o[6], o[7], o[8]}};
  }

  // counts: pairs of each page; token, weight and to of every pair.
  void run(const std::vector<Address>& pages, const std::vector<int64_t>& counts, Address token, Address weight,
           Address to, bool store, Address x, bool half, int64_t n, Address out, int64_t n_out) const {
    if (counts.size() != pages.size()) throw nb::value_error("every page needs its number of tokens");
    std::vector<int64_t> first(1, 0);
    for (int64_t count : counts) first.push_back(first.back() + count);
    compute(pages, first, at<int64_t>(token), at<float>(weight), at<int64_t>(to), store, x, half, n, out, n_out);
  }

  // Page i runs the pairs places[spans[2 i]] to places[spans[2 i + 1] - 1]: a place is token * k + its number.
  void run_places(const std::vector<Address>& pages, const std::vector<int64_t>& spans, Address places,
                  int64_t n_places, int64_t k, Address weight, Address x, bool half, int64_t n, Address out) const {
    if (spans.size() != 2 * pages.size()) throw nb::value_error("every page needs its span of places");
    std::vector<int64_t> first(1, 0), token, to;
    std::vector<float> weights;
    for (size_t i = 0; i < pages.size(); ++i) {
      if (spans[2 * i] < 0 || spans[2 * i] > spans[2 * i + 1] || spans[2 * i + 1] > n_places)
        throw nb::value_error("A span is outside of the places.");
      to.insert(to.end(), at<int64_t>(places) + spans[2 * i], at<int64_t>(places) + spans[2 * i + 1]);
      first.push_back(static_cast<int64_t>(to.size()));
    }
    check_range("places", to.data(), first.back(), n * k);
    for (int64_t place : to) {
      token.push_back(place / k);
      weights.push_back(at<float>(weight)[place]);
    }
    compute(pages, first, token.data(), weights.data(), to.data(), true, x, half, n, out, n * k);
  }

 private:
  void compute(const std::vector<Address>& pages, const std::vector<int64_t>& first, const int64_t* token,
               const float* weight, const int64_t* to, bool store, Address x, bool half, int64_t n, Address out,
               int64_t n_out) const {
    check_range("tokens", token, first.back(), n);
    if (store) {
      check_range("rows", to, first.back(), n_out);
      check_apart(to, first.back(), n_out);
    }
    std::vector<const uint8_t*> bytes;
    for (Address page : pages) bytes.push_back(at<uint8_t>(page));
    const Routing routing{static_cast<int64_t>(bytes.size()), bytes.data(), first.data(), token, weight, to, store};
    nb::gil_scoped_release release;
    experts(shape, routing, at<void>(x), half, n, at<float>(out));
  }
};

// shape: n, heads, kv_heads, d_k, d_v, rotary, position, window. rows: of a head, the first's position, in the ring.
void py_attend(const std::vector<int64_t>& shape, Address joined, Address cos, Address sin, float value_scale,
               float scale, int store, Address keys, Address values, const std::vector<int64_t>& rows, Address sink,
               Address out) {
  if (shape.size() != 8 || rows.size() != 3) throw nb::value_error("attention has eight sizes and three of its rows");
  if (store < 0 || store > 2) throw nb::value_error("unknown storage of keys and values");
  const int64_t* s = shape.data();
  const AttendCall call{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], at<float>(joined), at<float>(cos),
                        at<float>(sin), value_scale, scale, static_cast<Store>(store), at<uint8_t>(keys),
                        at<uint8_t>(values), rows[0], rows[1], rows[2], at<float>(sink), at<float>(out)};
  nb::gil_scoped_release release;
  attend(call);
}

// sizes: hidden, heads, kv_heads, d_k, d_v, window. factors: eps, the logits' and the values' scale. norms: attention's,
// the MLP's, the sink (0: none). matrices: qkv, o, and without a router gate, up, down.
struct PyBlock {
  LayerBlock b;
  PyBlock(const std::vector<int64_t>& sizes, const std::vector<float>& factors, const std::vector<Address>& norms,
              const std::vector<PyMatrix>& matrices, int64_t n_experts, int64_t top_k, Address router, Address bias,
              float routed_scale, bool normalise, bool rounded) {
    const bool routed = n_experts > 0;
    if (sizes.size() != 6 || factors.size() != 3 || norms.size() != 3 || matrices.size() != (routed ? 2u : 5u))
      throw nb::value_error("a block has six sizes, three factors, three vectors and two or five matrices");
    const Matrix none = matrices[0].w;
    b = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], factors[0], factors[1], factors[2],
         at<float>(norms[0]), at<float>(norms[1]), at<float>(norms[2]), matrices[0].w, matrices[1].w, routed,
         n_experts, top_k, at<float>(router), at<float>(bias), routed_scale, normalise, rounded,
         routed ? none : matrices[2].w, routed ? none : matrices[3].w, routed ? none : matrices[4].w};
  }

  // places: n, position, cos, sin, rotated dimensions, storage, keys, values, rows, the first's position of each piece.
  void run(const std::vector<int64_t>& places, Address x, Address normed, Address chosen, Address weights) const {
    if (places.empty() || places.size() % 10) throw nb::value_error("a piece has ten numbers");
    std::vector<SequenceRows> sequences;
    for (size_t i = 0; i < places.size(); i += 10) {
      const int64_t* p = places.data() + i;
      if (p[5] < 0 || p[5] > 2) throw nb::value_error("unknown storage of keys and values");
      const auto address = [&](int j) { return static_cast<Address>(p[j]); };
      sequences.push_back({p[0], p[1], at<float>(address(2)), at<float>(address(3)), p[4], static_cast<Store>(p[5]),
                        at<uint8_t>(address(6)), at<uint8_t>(address(7)), p[8], p[9]});
    }
    nb::gil_scoped_release release;
    run_block(b, sequences, at<float>(x), at<float>(normed), at<int64_t>(chosen), at<float>(weights));
  }
};

void py_rms_norm(Address x, Address add, Address weight, float eps, int64_t n, int64_t hidden, Address out) {
  nb::gil_scoped_release release;
  rms_norm(at<float>(x), at<float>(add), at<float>(weight), eps, n, hidden, at<float>(out));
}

void py_route(int64_t n, int64_t hidden, int64_t n_experts, int64_t top_k, Address x, Address weight, Address bias,
              float scale, bool normalise, Address chosen, Address weights) {
  const RouteCall call{n, hidden, n_experts, top_k, at<float>(x), at<float>(weight), at<float>(bias),
                       scale, normalise, at<int64_t>(chosen), at<float>(weights)};
  nb::gil_scoped_release release;
  route(call);
}

void py_add_in_order(Address terms, int64_t n, int64_t k, int64_t width, Address out) {
  nb::gil_scoped_release release;
  add_in_order(at<float>(terms), n, k, width, at<float>(out));
}

// tables: values, code_of_rank, position, midpoint, rough, scale_of_byte, covers.
double py_encode(int format, const std::vector<Address>& tables, int n_covers, float per_unit, float centre,
                 const std::vector<int32_t>& steps, Address w, int64_t rows, int64_t cols, float scale, Address codes,
                 Address scales) {
  if (tables.size() != 7) throw nb::value_error("a book has seven tables");
  const Book book{at<float>(tables[0]), at<int32_t>(tables[1]), at<int32_t>(tables[2]), at<float>(tables[3]),
                  at<float>(tables[4]), at<float>(tables[5]),   at<float>(tables[6]),   n_covers,
                  per_unit,             centre,                 steps.data(),
                  static_cast<int>(steps.size())};
  const Format f = format_of(format);
  nb::gil_scoped_release release;
  return encode(book, f, at<float>(w), rows, cols, scale, at<uint8_t>(codes), at<uint8_t>(scales));
}

uint32_t py_crc32(Address data, size_t n, uint32_t value, bool plain) {
  nb::gil_scoped_release release;
  return plain ? crc32_plain(value, at<uint8_t>(data), n) : crc32(value, at<uint8_t>(data), n);
}

std::tuple<int64_t, int64_t> py_part_bytes(int format, int64_t rows, int64_t cols) {
  const Format f = format_of(format);
  return {codes_bytes(f, rows, cols), scales_bytes(f, rows, cols)};
}

void set_threads(int n) {
  nb::gil_scoped_release release;
  Pool::instance().set_threads(n);
}

bool pin(const std::vector<int>& cpus) {
  nb::gil_scoped_release release;
  return Pool::instance().pin(cpus);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels over packed bytes; use quant.kernels, which checks sizes.";
  nb::class_<PyMatrix>(m, "Matrix")
      .def(nb::init<int, int64_t, int64_t, Address, Address, Address>())
      .def("multiply", &PyMatrix::multiply);
  nb::class_<PyExperts>(m, "Experts")
      .def(nb::init<int, int64_t, int64_t, const std::vector<int64_t>&>())
      .def("run", &PyExperts::run)
      .def("run_places", &PyExperts::run_places);
  nb::class_<PyBlock>(m, "Block")
      .def(nb::init<const std::vector<int64_t>&, const std::vector<float>&, const std::vector<Address>&,
                    const std::vector<PyMatrix>&, int64_t, int64_t, Address, Address, float, bool, bool>())
      .def("run", &PyBlock::run);
  m.def("attend", &py_attend);
  m.def("rms_norm", &py_rms_norm);
  m.def("route", &py_route);
  m.def("add_in_order", &py_add_in_order);
  m.def("encode", &py_encode);
  m.def("read_all", [](Address data, size_t n) {
    nb::gil_scoped_release release;
    return read_all(at<uint8_t>(data), n);
  });
  m.def("crc32", &py_crc32);
  m.def("part_bytes", &py_part_bytes);
  m.def("supported", &supported);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("force", &force);
  m.def("set_threads", &set_threads);
  m.def("threads", [] { return Pool::instance().threads(); });
  m.def("pin", &pin);
}
