// The Python module kimi_lite.runtime._kernels: shapes are checked here, in sentences; everything below trusts them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "ops.h"

namespace nb = nanobind;
void bind_vision(nb::module_& m);  // vision_bindings.cpp
using namespace nb::literals;
using namespace kimi;

namespace {
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using IntsOut = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;

void require(bool ok, const std::string& sentence) {
  if (!ok) throw nb::value_error(sentence.c_str());
}

template <typename A>
int axis(const A& a, size_t i, const char* name) {
  require(i < a.ndim(), std::string(name) + " has " + std::to_string(a.ndim()) + " axes, too few");
  return static_cast<int>(a.shape(i));
}

void same(int found, int expected, const char* what) {
  require(found == expected, std::string(what) + " is " + std::to_string(found) + ", expected " + std::to_string(expected));
}

Weights weights(const std::string& type, const Bytes& data, size_t offset, size_t stride, int rows, int columns) {
  const Block& block = block_named(type.c_str());
  require(rows > 0 && columns > 0, "a matrix needs rows and columns");
  require(columns % (block.elements == 1 ? 16 : kGroup) == 0 && columns % block.elements == 0,
          type + " needs columns in whole blocks of " + std::to_string(std::max(block.elements, kGroup)) + ", not " + std::to_string(columns));
  const bool packed = block.kind == Kind::q4g32 || block.kind == Kind::q8g32;
  const size_t row_bytes = static_cast<size_t>(columns) / block.elements * block.bytes;
  const size_t need = packed ? (static_cast<size_t>(rows + kRows - 1) / kRows - 1) * stride + row_bytes * kRows : row_bytes * rows;
  require(offset + need <= data.shape(0), "a matrix of " + std::to_string(need) + " bytes does not lie in its data");
  return {&block, data.data() + offset, stride, rows, columns};
}
}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "CPU kernels on packed and ggml weights. See docs/kernels.md.";
  bind_vision(m);
  nb::class_<Weights>(m, "Weights", "One matrix, where it lies; keeps its bytes alive.")
      .def("__init__",
           [](Weights* self, const std::string& type, const Bytes& data, size_t offset, size_t stride, int rows, int columns) {
             new (self) Weights(weights(type, data, offset, stride, rows, columns));
           },
           "type"_a, "data"_a, "offset"_a, "stride"_a, "rows"_a, "columns"_a, nb::keep_alive<1, 3>())
      .def_ro("rows", &Weights::rows)
      .def_ro("columns", &Weights::columns);
  nb::class_<Mlp>(m, "Mlp", "Gate, up and down of one or more experts; the caller keeps their bytes alive.")
      .def(nb::init<>())
      .def("add", [](Mlp& self, const Weights& gate, const Weights& up, const Weights& down) {
        require(gate.rows == up.rows && gate.columns == up.columns && down.rows == gate.columns && down.columns == gate.rows,
                "gate and up must be [F, D] and down [D, F]");
        require(gate.rows % kGroup == 0, "the width of an MLP must be a multiple of 32");
        self.gate.push_back(gate);
        self.up.push_back(up);
        self.down.push_back(down);
      }, "gate"_a, "up"_a, "down"_a);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (const char* name : usable_kernels()) names.emplace_back(name);
    return names;
  });
  m.def("use_isa", [](const std::string& name) { use_kernels(name.c_str()); }, "name"_a);
  m.def("threads", [] { return pool().n_threads(); });
  m.def("set_threads", [](int n) { set_threads(n); }, "n"_a);
  m.def("linear", [](const Weights& w, const Floats& x, const Out& y) {
    const int T = axis(x, 0, "x");
    same(axis(x, 1, "x"), w.columns, "x's width");
    same(axis(y, 0, "y"), T, "y's length");
    same(axis(y, 1, "y"), w.rows, "y's width");
    nb::gil_scoped_release free;
    linear(w, x.data(), T, y.data());
  }, "w"_a, "x"_a, "y"_a);
  m.def("linear_heads", [](const std::vector<Weights>& w, const Floats& x, const Out& y) {
    const int T = axis(x, 0, "x");
    same(axis(x, 1, "x"), static_cast<int>(w.size()), "x's heads");
    same(axis(y, 1, "y"), static_cast<int>(w.size()), "y's heads");
    same(axis(y, 0, "y"), T, "y's length");
    for (const Weights& each : w) {
      same(axis(x, 2, "x"), each.columns, "x's width");
      same(axis(y, 2, "y"), each.rows, "y's width");
    }
    nb::gil_scoped_release free;
    linear_heads(w, x.data(), T, y.data());
  }, "w"_a, "x"_a, "y"_a);
  m.def("embed", [](const Weights& w, const Ints& ids, const Out& y) {
    const int T = axis(ids, 0, "ids");
    same(axis(y, 0, "y"), T, "y's length");
    same(axis(y, 1, "y"), w.columns, "y's width");
    for (int t = 0; t < T; ++t) require(ids.data()[t] >= 0 && ids.data()[t] < w.rows, "a token id lies outside the vocabulary");
    nb::gil_scoped_release free;
    embed(w, ids.data(), T, y.data());
  }, "w"_a, "ids"_a, "y"_a);
  m.def("rms_norm", [](const Floats& x, const Floats& weight, float eps, const Out& y) {
    const int T = axis(x, 0, "x"), D = axis(x, 1, "x");
    same(axis(weight, 0, "weight"), D, "the norm's width");
    same(axis(y, 0, "y"), T, "y's length");
    same(axis(y, 1, "y"), D, "y's width");
    require(D % 16 == 0, "rms_norm needs a width in multiples of 16");
    nb::gil_scoped_release free;
    rms_norm(x.data(), weight.data(), T, D, eps, y.data());
  }, "x"_a, "weight"_a, "eps"_a, "y"_a);
  m.def("route", [](const Floats& x, const Floats& router, const Floats& bias, float scale, const IntsOut& ids, const Out& out) {
    const int T = axis(x, 0, "x"), D = axis(x, 1, "x"), E = axis(router, 0, "router"), A = axis(ids, 1, "ids");
    same(axis(router, 1, "router"), D, "the router's width");
    same(axis(bias, 0, "bias"), E, "the bias's length");
    same(axis(ids, 0, "ids"), T, "ids' length");
    same(axis(out, 0, "weights"), T, "weights' length");
    same(axis(out, 1, "weights"), A, "weights' width");
    require(A <= E && D % 16 == 0, "route needs at most all experts, and a width in multiples of 16");
    nb::gil_scoped_release free;
    route(x.data(), router.data(), bias.data(), T, D, E, A, scale, ids.data(), out.data());
  }, "x"_a, "router"_a, "bias"_a, "scale"_a, "ids"_a, "weights"_a);
  m.def("mixture", [](const Mlp& routed, const Ints& ids, const Floats& w, const Mlp* shared, const Floats& x, const Out& y) {
    const int T = axis(x, 0, "x"), D = axis(x, 1, "x"), A = axis(ids, 1, "ids");
    require(A == 0 || !routed.gate.empty(), "the mixture has no experts");
    for (const Mlp* mlp : {&routed, shared})
      if (mlp && !mlp->gate.empty()) same(mlp->gate[0].columns, D, "the experts' width");
    same(axis(ids, 0, "ids"), T, "ids' length");
    same(axis(w, 1, "weights"), A, "weights' width");
    same(axis(y, 0, "y"), T, "y's length");
    same(axis(y, 1, "y"), D, "y's width");
    for (int i = 0; i < T * A; ++i)
      require(ids.data()[i] >= 0 && ids.data()[i] < static_cast<int>(routed.gate.size()), "an expert's index is out of range");
    nb::gil_scoped_release free;
    mixture(routed, ids.data(), w.data(), A, shared, x.data(), T, D, y.data());
  }, "routed"_a, "ids"_a, "weights"_a, "shared"_a.none(), "x"_a, "y"_a);
  m.def("attention", [](const Floats& q, const Floats& qr, const Halves& cache, const Halves& rope, int start, float scale, const Out& u) {
    const int T = axis(q, 0, "q"), H = axis(q, 1, "q"), C = axis(q, 2, "q"), R = axis(qr, 2, "qr");
    same(axis(qr, 0, "qr"), T, "qr's length");
    same(axis(qr, 1, "qr"), H, "qr's heads");
    same(axis(cache, 1, "cache"), C, "the latent's width");
    same(axis(rope, 1, "rope"), R, "the rotated key's width");
    same(axis(u, 0, "u"), T, "u's length");
    same(axis(u, 1, "u"), H, "u's heads");
    same(axis(u, 2, "u"), C, "u's width");
    require(start >= 0 && start + T <= axis(cache, 0, "cache") && start + T <= axis(rope, 0, "rope"), "the cache is shorter than the positions asked for");
    require(C % 16 == 0 && R % 16 == 0, "attention needs widths in multiples of 16");
    nb::gil_scoped_release free;
    attention(q.data(), qr.data(), cache.data(), rope.data(), start, T, H, C, R, scale, u.data());
  }, "q"_a, "qr"_a, "cache"_a, "rope"_a, "start"_a, "scale"_a, "u"_a);
}
