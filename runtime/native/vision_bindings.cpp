// The image tower's part of kimi_lite.runtime._kernels. Arrays are [rows, width]; `out` may be wider, and is then padded
// with zeros, since a product reads its inputs in groups of 32.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "ops.h"
#include "vision_ops.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kimi;

namespace {
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Line = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* sentence) {
  if (!ok) throw nb::value_error(sentence);
}
int n(size_t size) { return static_cast<int>(size); }
}  // namespace

void bind_vision(nb::module_& m) {
  m.def("pack_q8", [](const Rows& w, const BytesOut& out) {
    const size_t groups = (w.shape(1) + kGroup - 1) / kGroup, blocks = (w.shape(0) + kRows - 1) / kRows;
    require(out.shape(0) == groups * blocks * kQ8Run, "pack_q8: the output has not the packed matrix's size");
    nb::gil_scoped_release free;
    pack_q8(w.data(), n(w.shape(0)), n(w.shape(1)), out.data());
  }, "w"_a, "out"_a);
  m.def("layer_norm", [](const Rows& x, const Line& weight, const Line& bias, float eps, const Out& out) {
    require(weight.shape(0) == x.shape(1) && bias.shape(0) == x.shape(1), "layer_norm: weight and bias need x's width");
    require(out.shape(0) == x.shape(0) && out.shape(1) >= x.shape(1), "layer_norm: out needs x's rows and at least its width");
    nb::gil_scoped_release free;
    norm_rows(x.data(), weight.data(), bias.data(), n(x.shape(0)), n(x.shape(1)), eps, out.data(), n(out.shape(1)));
  }, "x"_a, "weight"_a, "bias"_a, "eps"_a, "out"_a);
  m.def("gelu", [](const Rows& x, const Line& bias, bool exact, const Out& out) {
    require(bias.shape(0) == x.shape(1), "gelu: the bias needs x's width");
    require(out.shape(0) == x.shape(0) && out.shape(1) >= x.shape(1), "gelu: out needs x's rows and at least its width");
    nb::gil_scoped_release free;
    gelu_rows(x.data(), bias.data(), n(x.shape(0)), n(x.shape(1)), exact, out.data(), n(out.shape(1)));
  }, "x"_a, "bias"_a, "exact"_a, "out"_a);
  m.def("add_bias", [](const Rows& y, const Line& bias, const Out& x) {
    require(bias.shape(0) == y.shape(1) && x.shape(0) == y.shape(0) && x.shape(1) == y.shape(1), "add_bias: x, y and bias differ in shape");
    nb::gil_scoped_release free;
    add_rows(y.data(), bias.data(), n(y.shape(0)), n(y.shape(1)), x.data());
  }, "y"_a, "bias"_a, "x"_a);
  m.attr("PATCH_BLOCK") = kKeys;
  nb::class_<PatchStore>(m, "PatchStore", "Queries, keys and values of one picture in one layer, as 16-bit integers.")
      .def("__init__", [](PatchStore* self, int N, int H, int K) {
        require(N > 0 && H > 0, "a picture needs patches and heads");
        require(K > 0 && K % 2 == 0 && K <= kMaxHead, "a head of the image tower needs an even width of at most 128");
        new (self) PatchStore(N, H, K);
      }, "patches"_a, "heads"_a, "width"_a)
      .def("place", [](PatchStore& self, int first, const Rows& qkv, const Line& bias, const Rows& cos, const Rows& sin) {
        const int T = n(qkv.shape(0)), W = 3 * self.view.H * self.view.K;
        require(n(qkv.shape(1)) == W && n(bias.shape(0)) == W, "place: qkv and its bias need three times the tower's width");
        require(n(cos.shape(0)) == T && n(sin.shape(0)) == T && n(cos.shape(1)) == self.view.K / 2 && n(sin.shape(1)) == self.view.K / 2,
                "place: one angle is needed for each row and pair of channels");
        require(first >= 0 && first % kKeys == 0 && first + T <= self.view.N, "place: rows begin at a whole block and end within the picture");
        require(T % kKeys == 0 || first + T == self.view.N, "place: only the picture's last rows may fill a block in part");
        nb::gil_scoped_release free;
        place_patches(self.view, qkv.data(), bias.data(), cos.data(), sin.data(), first, T);
      }, "first"_a, "qkv"_a, "bias"_a, "cos"_a, "sin"_a)
      .def("attend", [](const PatchStore& self, int first, const Out& out) {
        require(first >= 0 && first + n(out.shape(0)) <= self.view.N && n(out.shape(1)) >= self.view.H * self.view.K, "attend: out does not fit the picture");
        nb::gil_scoped_release free;
        attend_patches(self.view, first, n(out.shape(0)), out.data(), n(out.shape(1)));
      }, "first"_a, "out"_a);
}
