// The Python module kimi_lite.runtime._kernels: shapes are checked here, in sentences; everything below trusts them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>
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
using BytesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntsOut = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;

std::mutex one_at_a_time;  // two Python threads may call; scratch memory and the pool serve one
// Lets other Python threads run while this one computes.
struct Computing {
  nb::gil_scoped_release free;
  std::lock_guard<std::mutex> hold{one_at_a_time};
};

// Ctrl-C need not wait for the end of a long pass.
void raise_signals() {
  nb::gil_scoped_acquire python;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

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
  const bool packed = is_packed(block.kind);
  const size_t row_bytes = static_cast<size_t>(columns) / block.elements * block.bytes;
  const size_t need = packed ? (static_cast<size_t>(rows + kRows - 1) / kRows - 1) * stride + row_bytes * kRows : row_bytes * rows;
  require(offset + need <= data.shape(0), "a matrix of " + std::to_string(need) + " bytes does not lie in its data");
  return {&block, data.data() + offset, stride, rows, columns};
}

// x [T][H][width], as attention reads it.
Heads heads(const Floats& x) { return {x.data(), x.shape(1) * x.shape(2), x.shape(2)}; }

// How many tokens attention is asked for, all shapes being right.
int checked_tokens(const AttentionLayer& layer, const LatentCache& cache, const Out& x, const Floats& cos, const Floats& sin, int start) {
  const int T = axis(x, 0, "x"), C = layer.k_b[0].rows, R = layer.kv_a.rows - C;
  same(axis(x, 1, "x"), layer.q.columns, "x's width");
  for (const Floats* table : {&cos, &sin}) {
    same(axis(*table, 0, "the angles"), T, "the angles' length");
    same(axis(*table, 1, "the angles"), R / 2, "the angles' width");
  }
  same(cache.C, C, "the cached latent's width");
  same(cache.R, R, "the cached key's width");
  require(start >= 0 && start + T <= cache.context, "the cache is shorter than the positions asked for");
  return T;
}
}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "CPU kernels on packed and ggml weights. See docs/kernels.md.";
  bind_vision(m);
  between_parts = raise_signals;
  nb::set_leak_warnings(false);  // a model that lives until the interpreter ends is no leak to tell a person about
  nb::class_<Weights>(m, "Weights", "One matrix, where it lies; keeps its bytes alive.")
      .def("__init__",
           [](Weights* self, const std::string& type, const Bytes& data, size_t offset, size_t stride, int rows, int columns) {
             new (self) Weights(weights(type, data, offset, stride, rows, columns));
           },
           "type"_a, "data"_a, "offset"_a, "stride"_a, "rows"_a, "columns"_a, nb::keep_alive<1, 3>())
      .def_ro("rows", &Weights::rows)
      .def_ro("columns", &Weights::columns);
  nb::class_<Mlp>(m, "Mlp", "Gate, up and down of one or more experts; keeps their bytes alive.")
      .def(nb::init<>())
      .def("add", [](Mlp& self, const Weights& gate, const Weights& up, const Weights& down) {
        require(gate.rows == up.rows && gate.columns == up.columns && down.rows == gate.columns && down.columns == gate.rows,
                "gate and up must be [F, D] and down [D, F]");
        require(gate.rows % kGroup == 0, "the width of an MLP must be a multiple of 32");
        self.gate.push_back(gate);
        self.up.push_back(up);
        self.down.push_back(down);
      }, "gate"_a, "up"_a, "down"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (const char* name : usable_kernels()) names.emplace_back(name);
    return names;
  });
  m.def("use_isa", [](const std::string& name) { use_kernels(name.c_str()); }, "name"_a);
  m.def("threads", [] { return pool().n_threads(); });
  m.def("set_threads", [](int n) {
    Computing computing;
    set_threads(n);
  }, "n"_a);
  m.def("pool_times", [] {
    const Pool::Times times = pool().times();
    return nb::make_tuple(times.calls, times.ns);
  }, "Calls of the thread pool since its threads were set, and nanoseconds inside them.");
  m.def("empty_calls", [](int repeats) {
    Computing computing;
    for (int i = 0; i < repeats; ++i) pool().run(pool().n_threads(), [](int, int) {});
  }, "repeats"_a, "Calls that do nothing: what starting and joining the threads costs.");
  m.def("linear", [](const Weights& w, const Floats& x, const Out& y) {
    const int T = axis(x, 0, "x");
    same(axis(x, 1, "x"), w.columns, "x's width");
    same(axis(y, 0, "y"), T, "y's length");
    same(axis(y, 1, "y"), w.rows, "y's width");
    Computing computing;
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
    Computing computing;
    linear_heads(w, x.data(), T, y.data());
  }, "w"_a, "x"_a, "y"_a);
  m.def("embed", [](const Weights& w, const Ints& ids, const Out& y) {
    const int T = axis(ids, 0, "ids");
    same(axis(y, 0, "y"), T, "y's length");
    same(axis(y, 1, "y"), w.columns, "y's width");
    require(!is_packed(w.block->kind) || w.block->kind <= Kind::q8g32, std::string("rows of ") + w.block->name + " cannot be looked up");
    for (int t = 0; t < T; ++t) require(ids.data()[t] >= 0 && ids.data()[t] < w.rows, "a token id lies outside the vocabulary");
    Computing computing;
    constexpr int kShare = 8;  // rows that a thread takes at once
    const auto share = [&](int i, int) {
      const int first = i * kShare;
      embed(w, ids.data() + first, std::min(kShare, T - first), y.data() + static_cast<size_t>(first) * w.columns);
    };
    if (T <= kShare) share(0, 0);
    else pool().run((T + kShare - 1) / kShare, share);
  }, "w"_a, "ids"_a, "y"_a);
  m.def("copy", [](const BytesOut& to, const Bytes& from) {
    same(axis(to, 0, "to"), axis(from, 0, "from"), "the copy's size");
    constexpr size_t kShare = 256 << 10;  // bytes that a thread takes at once
    const size_t n = from.size();
    Computing computing;
    pool().run(static_cast<int>((n + kShare - 1) / kShare), [&](int i, int) {
      const size_t first = i * kShare;
      std::memcpy(to.data() + first, from.data() + first, std::min(kShare, n - first));
    });
  }, "to"_a, "from_"_a);
  m.def("packed_as", [](const std::string& type) -> std::optional<std::string> {
    const char* name = packed_as(block_named(type.c_str()).kind);
    return name ? std::optional<std::string>(name) : std::nullopt;
  }, "type"_a);
  m.def("pack", [](const Weights& w, const BytesOut& out) {
    const char* name = packed_as(w.block->kind);
    require(name != nullptr, std::string(w.block->name) + " has no packed layout");
    const Block& packed = block_named(name);
    const size_t size = static_cast<size_t>(w.rows + kRows - 1) / kRows * kRows * w.columns / packed.elements * packed.bytes;
    require(out.shape(0) == size, "the packed matrix takes " + std::to_string(size) + " bytes");
    Computing computing;
    pack(w, out.data());
  }, "w"_a, "out"_a);
  m.def("rms_norm", [](const Floats& x, const Floats& weight, float eps, const Out& y) {
    const int T = axis(x, 0, "x"), D = axis(x, 1, "x");
    same(axis(weight, 0, "weight"), D, "the norm's width");
    same(axis(y, 0, "y"), T, "y's length");
    same(axis(y, 1, "y"), D, "y's width");
    require(D % 16 == 0, "rms_norm needs a width in multiples of 16");
    Computing computing;
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
    Computing computing;
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
    Computing computing;
    mixture(routed, ids.data(), w.data(), A, shared, x.data(), T, D, y.data());
  }, "routed"_a, "ids"_a, "weights"_a, "shared"_a.none(), "x"_a, "y"_a);
  m.def("expert_outputs", [](const Mlp& mlp, const Ints& experts, const Ints& tokens, const Floats& x, const Out& y) {
    const int T = axis(x, 0, "x"), D = axis(x, 1, "x"), n = axis(experts, 0, "experts");
    require(!mlp.gate.empty(), "there are no experts");
    same(mlp.gate[0].columns, D, "the experts' width");
    same(axis(tokens, 0, "tokens"), n, "tokens' length");
    same(axis(y, 0, "y"), n, "y's length");
    same(axis(y, 1, "y"), D, "y's width");
    for (int i = 0; i < n; ++i) {
      require(experts.data()[i] >= 0 && experts.data()[i] < static_cast<int>(mlp.gate.size()), "an expert's index is out of range");
      require(tokens.data()[i] >= 0 && tokens.data()[i] < T, "a token's index is out of range");
    }
    Computing computing;
    expert_outputs(mlp, experts.data(), tokens.data(), n, x.data(), T, D, y.data());
  }, "mlp"_a, "experts"_a, "tokens"_a, "x"_a, "y"_a);
  m.def("combine", [](const Floats& outputs, const Floats& w, const Floats& shared, const Out& x) {
    const int T = axis(x, 0, "x"), D = axis(x, 1, "x"), A = axis(w, 1, "weights");
    require(D % 16 == 0, "combine needs a width in multiples of 16");
    same(axis(outputs, 0, "outputs"), T, "outputs' length");
    same(axis(outputs, 1, "outputs"), A, "outputs' experts");
    same(axis(outputs, 2, "outputs"), D, "outputs' width");
    same(axis(w, 0, "weights"), T, "weights' length");
    same(axis(shared, 0, "shared"), T, "shared's length");
    same(axis(shared, 1, "shared"), D, "shared's width");
    Computing computing;
    combine(outputs.data(), w.data(), A, shared.data(), T, D, x.data());
  }, "outputs"_a, "weights"_a, "shared"_a, "x"_a);
  nb::class_<LatentCache>(m, "LatentCache", "One layer's latent cache, in the packed layout q8g32. Keeps its bytes alive.")
      .def("__init__",
           [](LatentCache* self, const BytesOut& rows, const BytesOut& columns, int context, int C, int R) {
             require(C > 0 && C % 32 == 0 && R > 0 && R % 16 == 0 && context > 0, "the latent's width must be a multiple of 32, the key's of 16");
             LatentCache cache{rows.data(), columns.data(), context, C, R};
             require(rows.shape(0) == (context + kRows - 1) / kRows * cache.rows_stride() && columns.shape(0) == C / kRows * cache.columns_stride(),
                     "the cache's bytes do not follow from its sizes");
             new (self) LatentCache(cache);
           },
           "rows"_a, "columns"_a, "context"_a, "C"_a, "R"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());
  m.def("remember", [](const LatentCache& cache, const Floats& rows, int start) {
    const int T = axis(rows, 0, "rows");
    same(axis(rows, 1, "rows"), cache.C + cache.R, "a row's width");
    require(start >= 0 && start + T <= cache.context, "the cache is shorter than the positions asked for");
    Computing computing;
    remember(cache, rows.data(), T, start);
  }, "cache"_a, "rows"_a, "start"_a);
  m.def("turn_columns", [](const LatentCache& cache, int first, int end) {
    require(0 <= first && first <= end && end <= cache.context, "the cache has no such positions");
    Computing computing;
    turn_columns(cache, first, end);
  }, "cache"_a, "first"_a, "end"_a);
  m.def("attention", [](const LatentCache& cache, const Floats& q, const Floats& qr, int start, float scale, const Out& u) {
    const int T = axis(q, 0, "q"), H = axis(q, 1, "q");
    same(axis(q, 2, "q"), cache.C, "q's width");
    same(axis(qr, 0, "qr"), T, "qr's length");
    same(axis(qr, 1, "qr"), H, "qr's heads");
    same(axis(qr, 2, "qr"), cache.R, "qr's width");
    same(axis(u, 0, "u"), T, "u's length");
    same(axis(u, 1, "u"), H, "u's heads");
    same(axis(u, 2, "u"), cache.C, "u's width");
    require(start >= 0 && start + T <= cache.context, "the cache is shorter than the positions asked for");
    Computing computing;
    attention(cache, [](int) {}, q.data(), heads(qr), start, T, H, scale, u.data());
  }, "cache"_a, "q"_a, "qr"_a, "start"_a, "scale"_a, "u"_a);
  m.def("expanded_attention", [](const LatentCache& cache, const std::vector<Weights>& k_b, const std::vector<Weights>& v_b, const Floats& q,
                                 const Floats& qr, int start, float scale, const Out& o) {
    const int T = axis(q, 0, "q"), H = axis(q, 1, "q"), N = axis(q, 2, "q"), V = axis(o, 2, "o");
    require(k_b.size() == static_cast<size_t>(H) && v_b.size() == static_cast<size_t>(H), "k_b and v_b need one matrix a head");
    require(N % 32 == 0 && V % 16 == 0, "a head's width must be a multiple of 32, its values' of 16");
    for (int h = 0; h < H; ++h) {
      same(k_b[h].rows, cache.C, "k_b's height");
      same(k_b[h].columns, N, "k_b's width");
      same(v_b[h].rows, V, "v_b's height");
      same(v_b[h].columns, cache.C, "v_b's width");
    }
    same(axis(qr, 0, "qr"), T, "qr's length");
    same(axis(qr, 1, "qr"), H, "qr's heads");
    same(axis(qr, 2, "qr"), cache.R, "qr's width");
    same(axis(o, 0, "o"), T, "o's length");
    same(axis(o, 1, "o"), H, "o's heads");
    require(start >= 0 && start + T <= cache.context, "the cache is shorter than the positions asked for");
    Computing computing;
    const auto ask = [&](int first, int, int head, int) { return Queries{heads(q).from(first, head), heads(qr).from(first, head)}; };
    expanded_attention(cache, k_b, v_b, ask, start, T, scale, o.data());
  }, "cache"_a, "k_b"_a, "v_b"_a, "q"_a, "qr"_a, "start"_a, "scale"_a, "o"_a);
  nb::class_<AttentionLayer>(m, "AttentionLayer", "A layer's attention: norms, projections, heads. Keeps their bytes alive.")
      .def("__init__",
           [](AttentionLayer* self, const Floats& norm, const Weights& q, const Weights& kv_a, const Floats& kv_norm,
              const std::vector<Weights>& k_b, const std::vector<Weights>& v_b, const Weights& o, float eps, float kv_eps, float scale) {
             require(!k_b.empty() && k_b.size() == v_b.size(), "k_b and v_b need one matrix a head");
             const int D = q.columns, H = static_cast<int>(k_b.size()), N = k_b[0].columns, C = k_b[0].rows, V = v_b[0].rows;
             const int R = kv_a.rows - C;
             require(R > 0 && R % 16 == 0 && V % 16 == 0 && C % 32 == 0 && N % 32 == 0 && D % 32 == 0,
                     "head widths must be in multiples of 32, rope's and values' of 16");
             same(q.rows, H * (N + R), "q's height");
             same(kv_a.columns, D, "kv_a's width");
             same(o.rows, D, "o's height");
             same(o.columns, H * V, "o's width");
             for (int h = 0; h < H; ++h) {
               same(k_b[h].rows, C, "k_b's height");
               same(k_b[h].columns, N, "k_b's width");
               same(v_b[h].rows, V, "v_b's height");
               same(v_b[h].columns, C, "v_b's width");
             }
             same(axis(norm, 0, "norm"), D, "the norm's width");
             same(axis(kv_norm, 0, "kv_norm"), C, "the latent norm's width");
             new (self) AttentionLayer{norm.data(), kv_norm.data(), eps, kv_eps, scale, q, kv_a, o, k_b, v_b};
           },
           "norm"_a, "q"_a, "kv_a"_a, "kv_norm"_a, "k_b"_a, "v_b"_a, "o"_a, "eps"_a, "kv_eps"_a, "scale"_a,
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>());
  nb::class_<FeedForwardLayer>(m, "FeedForwardLayer", "A layer's feed-forward half. Keeps its bytes alive; without a router, the shared MLP alone.")
      .def("__init__",
           [](FeedForwardLayer* self, const Floats& norm, const Mlp& shared, float eps, std::optional<Floats> router,
              std::optional<Floats> bias, const Mlp* routed, int active, float scale, std::optional<Counts> used) {
             require(shared.gate.size() == 1, "a layer has one shared MLP");
             const int D = shared.gate[0].columns;
             same(axis(norm, 0, "norm"), D, "the norm's width");
             require(router.has_value() == bias.has_value() && router.has_value() == (routed != nullptr), "router, bias and routed experts come together");
             if (router) {
               const int E = static_cast<int>(routed->gate.size());
               require(E > 0 && active >= 1 && active <= E, "a layer needs at least as many experts as act");
               same(routed->gate[0].columns, D, "the experts' width");
               same(axis(*router, 0, "router"), E, "the router's height");
               same(axis(*router, 1, "router"), D, "the router's width");
               same(axis(*bias, 0, "bias"), E, "the bias's length");
               if (used) same(axis(*used, 0, "used"), E, "the counts' length");
             }
             new (self) FeedForwardLayer{norm.data(), eps, router ? router->data() : nullptr, bias ? bias->data() : nullptr,
                                         active, scale, routed ? *routed : Mlp{}, shared, used ? used->data() : nullptr};
           },
           "norm"_a, "shared"_a, "eps"_a, "router"_a.none(), "bias"_a.none(), "routed"_a.none(), "active"_a, "scale"_a, "used"_a.none(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(),
           nb::keep_alive<1, 10>());
  m.def("attention_layer", [](const AttentionLayer& layer, const Out& x, const Floats& cos, const Floats& sin, const LatentCache& cache, int start, bool expanded) {
    const int T = checked_tokens(layer, cache, x, cos, sin, start);
    Computing computing;
    attention_layer(layer, x.data(), T, cos.data(), sin.data(), cache, start, expanded, T);
  }, "layer"_a, "x"_a, "cos"_a, "sin"_a, "cache"_a, "start"_a, "expanded"_a);
  m.def("feed_forward_layer", [](const FeedForwardLayer& layer, const Out& x) {
    const int T = axis(x, 0, "x");
    same(axis(x, 1, "x"), layer.shared.gate[0].columns, "x's width");
    Computing computing;
    feed_forward_layer(layer, x.data(), T, T == 1);
  }, "layer"_a, "x"_a);
  nb::class_<Layers>(m, "Layers", "A model's layers and their caches, for `run_layers`. Keeps the three lists alive.")
      .def("__init__",
           [](Layers* self, const std::vector<const AttentionLayer*>& attention, const std::vector<const FeedForwardLayer*>& feed_forward,
              const std::vector<const LatentCache*>& caches) {
             require(!attention.empty() && attention.size() == feed_forward.size() && attention.size() == caches.size(),
                     "every layer needs attention, a feed-forward half and a cache");
             Layers layers;
             for (size_t i = 0; i < attention.size(); ++i) {
               same(attention[i]->q.columns, attention[0]->q.columns, "a layer's width");
               same(feed_forward[i]->shared.gate[0].columns, attention[0]->q.columns, "a layer's width");
               layers.all.push_back({attention[i], feed_forward[i], caches[i]});
             }
             new (self) Layers(std::move(layers));
           },
           "attention"_a, "feed_forward"_a, "caches"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());
  m.def("run_layers", [](const Layers& layers, int first, int end, const Out& x, const Floats& cos, const Floats& sin, int start, bool expanded,
                         int asking) {
    require(0 <= first && first <= end && end <= static_cast<int>(layers.all.size()), "there are not so many layers");
    for (int i = first; i < end; ++i) checked_tokens(*layers.all[i].attention, *layers.all[i].cache, x, cos, sin, start);
    const int T = axis(x, 0, "x");
    require(1 <= asking && asking <= T, "so many tokens cannot be asked for");
    Computing computing;
    run_layers(layers, first, end, x.data(), T, cos.data(), sin.data(), start, expanded, asking);
  }, "layers"_a, "first"_a, "end"_a, "x"_a, "cos"_a, "sin"_a, "start"_a, "expanded"_a, "asking"_a);
}
