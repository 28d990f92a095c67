// A driver library without a card: the functions of libcuda that runtime/cuda/driver.py calls, over the shim.
//
// It is as strict as a card may be. Work that was queued runs when its stream is waited for and not before, so a host
// buffer that is reused too early shows. Streams know of each other by events alone: one that is waited for runs ahead
// of all others, and of those only what it was told to wait for; so a missing order between them shows. Arguments are
// copied by the kernel's own C++ types, as the driver copies them. Fresh memory is NaN and ends at a page that nobody
// may touch. Launches beyond a card's limits are refused. Tests choose the machine with fake_machine and let a function
// fail with fake_fail.
#include <sys/mman.h>

#include <deque>
#include <map>
#include <set>
#include <string>
#include <tuple>

#include "shim.h"
// clang-format off
#include "arithmetic.cu"
#include "products.cu"
#include "attention.cu"
#include "experts.cu"
#include "vision.cu"
// clang-format on

namespace {
using Work = std::function<void()>;
using Result = int;  // CUresult
enum { kSuccess = 0, kInvalid = 1, kOutOfMemory = 2, kNoDevice = 100, kNoContext = 201, kNotFound = 500, kSticky = 700, kCapturing = 900 };

template <typename... A, size_t... I>
Work bound(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  return [kernel, copy = std::tuple<A...>(*static_cast<A*>(arguments[I])...)] { std::apply(kernel, copy); };
}
template <typename... A>
Work bound(void (*kernel)(A...), void** arguments) { return bound(kernel, arguments, std::index_sequence_for<A...>()); }

struct Function {
  const char* name;
  Work (*bind)(void** arguments);
};
#define ENTRY(kernel) {#kernel, [](void** arguments) { return bound(kernel, arguments); }}
const Function kFunctions[] = {
    ENTRY(rms_norm),     ENTRY(product_1),    ENTRY(product_8),    ENTRY(product_32),
    ENTRY(heads_1),      ENTRY(heads_8),      ENTRY(heads_32),     ENTRY(latents),
    ENTRY(scores_8),     ENTRY(scores_32),    ENTRY(softmax),      ENTRY(weigh_8),
    ENTRY(weigh_32),     ENTRY(finish),       ENTRY(route),        ENTRY(choose),       ENTRY(deal),
    ENTRY(combine),      ENTRY(fetch),        ENTRY(gate_up_1),    ENTRY(gate_up_8),    ENTRY(gate_up_32),
    ENTRY(down_jobs_8),  ENTRY(down_jobs_32), ENTRY(down),
    // The image tower's.
    ENTRY(embed_patches), ENTRY(layer_norm), ENTRY(quantize_rows), ENTRY(gelu_rows), ENTRY(add_bias), ENTRY(place_patches),
    ENTRY(attend_patches_5), ENTRY(attend_patches_8)};

using Graph = std::vector<Work>;
struct Stream {
  std::deque<Work> work;
  size_t n_queued = 0, n_done = 0;
};
struct Event {  // behind so much work of a stream; of none, if it was never recorded
  Stream* stream = nullptr;
  size_t at = 0;
};
std::set<Stream*> streams;
std::set<Event*> events;
Graph captured;
Stream* recorded;  // whose launches are captured
bool lost;
thread_local void* context;  // each thread has to make one current
int n_devices = 1, version = 13000, capability = 86;
size_t memory = size_t{1} << 30, used;
std::map<void*, size_t> blocks;
std::map<std::string, int> calls, fail_after, fail_code;

// The result that a call of `name` has before it does anything.
Result called(const char* name) {
  ++calls[name];
  if (lost) return kSticky;
  const std::string start = std::string(name).substr(0, 5);  // of those that need no context
  if (!context && start != "cuIni" && start != "cuDri" && start != "cuDev" && start != "cuCtx") return kNoContext;
  const auto at = fail_after.find(name);
  if (at == fail_after.end() || at->second-- > 0) return kSuccess;
  const int code = fail_code[name];
  fail_after.erase(at);
  lost = code >= kSticky;
  return code;
}
#define CALLED if (const Result r = called(__func__)) return r
void queue(Stream* s, Work work) {
  if (s == recorded) return captured.push_back(std::move(work));
  s->work.push_back(std::move(work));
  ++s->n_queued;
}
void run(Stream* s, size_t until) {
  while (s && s->n_done < until) {
    const Work next = std::move(s->work.front());
    s->work.pop_front();
    next();  // which may run another stream, but only up to what was queued before
    ++s->n_done;
  }
}
constexpr size_t kPage = 4096;
size_t pages(size_t n) { return (n + kPage - 1) / kPage * kPage; }
void unmap(void* at, size_t n) { munmap(static_cast<char*>(at) - (pages(n) - n) / 256 * 256, pages(n) + kPage); }
}  // namespace

extern "C" {
void fake_machine(int devices, int driver_version, int compute_capability, size_t bytes) {
  n_devices = devices, version = driver_version, capability = compute_capability, memory = bytes;
  calls.clear(), fail_after.clear(), captured.clear();
  for (Stream* s : streams) s->work.clear(), s->n_done = s->n_queued;
  if (lost) {  // what a lost card held, nobody could give back
    for (const auto& [at, n] : blocks) unmap(at, n);
    blocks.clear(), used = 0;
  }
  lost = false, recorded = nullptr;
}
void fake_fail(const char* name, int code, int after) { fail_code[name] = code, fail_after[name] = after; }
void fake_order(int backwards) { shim::backwards = backwards; }
// One step of the tensor cores on registers of the lanes, a [32][4], b [32][2] and c [32][4]: by four of Turing's if asked.
void fake_mma(int by_quarters, const u32* a, const u32* b, int* c) {
  shim::launch({1, 1, 1}, 32, 0, [=] {
    u32 x[4], y[2];
    int z[4], d[4];
    std::memcpy(x, a + 4 * threadIdx.x, sizeof x);
    std::memcpy(y, b + 2 * threadIdx.x, sizeof y);
    std::memcpy(z, c + 4 * threadIdx.x, sizeof z);
    by_quarters ? mma_by_quarters(d, x, y, z) : mma(d, x, y, z);
    std::memcpy(c + 4 * threadIdx.x, d, sizeof d);
  });
}
int fake_calls(const char* name) { return calls[name]; }
size_t fake_used() { return used; }
int fake_half(int bits) { return float_to_half(__int_as_float(bits)); }
float fake_float(int half) { return half_to_float(static_cast<u16>(half)); }

Result cuInit(unsigned) { CALLED; return n_devices ? kSuccess : kNoDevice; }
Result cuDriverGetVersion(int* out) { CALLED; *out = version; return kSuccess; }
Result cuDeviceGetCount(int* out) { CALLED; *out = n_devices; return kSuccess; }
Result cuDeviceGet(int* out, int ordinal) { CALLED; *out = ordinal; return kSuccess; }
Result cuDeviceGetName(char* out, int n, int ordinal) {
  CALLED;
  std::snprintf(out, n, "paper card %d", ordinal);
  return kSuccess;
}
Result cuDeviceGetAttribute(int* out, int which, int) {
  CALLED;
  if (which != 75 && which != 76) return kInvalid;  // compute capability, major and minor
  *out = which == 75 ? capability / 10 : capability % 10;
  return kSuccess;
}
Result cuDeviceTotalMem_v2(size_t* out, int ordinal) { CALLED; *out = memory * (ordinal + 1); return kSuccess; }
Result cuDevicePrimaryCtxRetain(void** out, int) { CALLED; *out = &n_devices; return kSuccess; }
Result cuDevicePrimaryCtxRelease_v2(int) { CALLED; context = nullptr; return kSuccess; }
Result cuCtxSetCurrent(void* which) { CALLED; context = which; return kSuccess; }
Result cuMemGetInfo_v2(size_t* free, size_t* total) { CALLED; *total = memory, *free = memory - used; return kSuccess; }
Result cuMemAlloc_v2(u64* out, size_t n) {
  CALLED;
  if (n == 0) return kInvalid;
  if (used + n > memory) return kOutOfMemory;
  const size_t size = pages(n);
  void* mapped = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* base = static_cast<char*>(mapped);
  mprotect(base + size, kPage, PROT_NONE);
  std::memset(base, 0xff, size);
  char* at = base + (size - n) / 256 * 256;  // aligned as a card aligns, as near to the end as that allows
  blocks[at] = n;
  used += n;
  *out = reinterpret_cast<u64>(at);
  return kSuccess;
}
Result cuMemFree_v2(u64 address) {
  CALLED;
  const auto at = blocks.find(reinterpret_cast<void*>(address));
  if (at == blocks.end()) return kInvalid;
  unmap(at->first, at->second);
  used -= at->second;
  blocks.erase(at);
  return kSuccess;
}
Result cuMemHostAlloc(void** out, size_t n, unsigned) { CALLED; *out = std::malloc(n); return kSuccess; }
Result cuMemFreeHost(void* at) { CALLED; std::free(at); return kSuccess; }
Result cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t n, Stream* s) {
  CALLED;
  queue(s, [=] { std::memcpy(reinterpret_cast<void*>(to), from, n); });
  return kSuccess;
}
Result cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t n, Stream* s) {
  CALLED;
  queue(s, [=] { std::memcpy(to, reinterpret_cast<void*>(from), n); });
  return kSuccess;
}
Result cuMemsetD8Async(u64 at, unsigned char value, size_t n, Stream* s) {
  CALLED;
  queue(s, [=] { std::memset(reinterpret_cast<void*>(at), value, n); });
  return kSuccess;
}
Result cuStreamCreate(Stream** out, unsigned) { CALLED; streams.insert(*out = new Stream); return kSuccess; }
Result cuStreamDestroy_v2(Stream* s) {
  CALLED;
  if (!streams.erase(s)) return kInvalid;
  for (Event* e : events)
    if (e->stream == s) e->stream = nullptr;
  delete s;
  return kSuccess;
}
Result cuStreamSynchronize(Stream* s) {
  CALLED;
  if (s == recorded) return kCapturing;
  run(s, s->n_queued);
  return kSuccess;
}
Result cuEventCreate(Event** out, unsigned) { CALLED; events.insert(*out = new Event); return kSuccess; }
Result cuEventDestroy_v2(Event* e) {
  CALLED;
  if (!events.erase(e)) return kInvalid;
  delete e;
  return kSuccess;
}
Result cuEventRecord(Event* e, Stream* s) {
  CALLED;
  if (s == recorded) return kCapturing;
  *e = {s, s->n_queued};
  return kSuccess;
}
Result cuStreamWaitEvent(Stream* s, const Event* e, unsigned) {
  CALLED;
  if (s == recorded) return kCapturing;
  queue(s, [seen = *e] { run(seen.stream, seen.at); });  // as it is now; later records do not count
  return kSuccess;
}
Result cuEventSynchronize(const Event* e) { CALLED; run(e->stream, e->at); return kSuccess; }
Result cuModuleLoadData(void** out, const void* image) {
  CALLED;
  if (std::memcmp(image, "\177ELF", 4)) return 200;  // no image of a kernel
  *out = &calls;
  return kSuccess;
}
Result cuModuleUnload(void*) { CALLED; return kSuccess; }
Result cuModuleGetFunction(const Function** out, void*, const char* name) {
  CALLED;
  for (const Function& each : kFunctions)
    if (std::string(each.name) == name) {
      *out = &each;
      return kSuccess;
    }
  return kNotFound;
}
Result cuLaunchKernel(const Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, Stream* s, void** arguments, void** extra) {
  CALLED;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535) return kInvalid;
  if (!bx || bx > 1024 || bx % 32 || by != 1 || bz != 1 || shared > kSharedLimit || extra) return kInvalid;
  queue(s, [=, work = f->bind(arguments)] { shim::launch({gx, gy, gz}, bx, shared, work); });
  return kSuccess;
}
Result cuStreamBeginCapture_v2(Stream* s, int) { CALLED; recorded = s; captured.clear(); return kSuccess; }
Result cuStreamEndCapture(Stream*, Graph** out) {
  CALLED;
  recorded = nullptr;
  *out = new Graph(captured);
  return kSuccess;
}
Result cuGraphInstantiateWithFlags(Graph** out, const Graph* graph, u64) {
  CALLED;
  *out = new Graph(*graph);
  return kSuccess;
}
Result cuGraphLaunch(const Graph* graph, Stream* s) {
  CALLED;
  for (const Work& each : *graph) queue(s, each);
  return kSuccess;
}
Result cuGraphDestroy(Graph* graph) { CALLED; delete graph; return kSuccess; }
Result cuGraphExecDestroy(Graph* graph) { CALLED; delete graph; return kSuccess; }
Result cuGetErrorString(int code, const char** out) {
  *out = code == kSticky ? "an illegal memory access was encountered" : "something else";
  return kSuccess;
}
}
