// Operations of a warp: all lanes of the mask meet, the last one computes where there is something
// to compute.

#include "emulator/float16.h"
#include "emulator/scheduler.h"

namespace vlmq::emulator {

namespace {

[[noreturn]] void fail_at(const char* operation, uint32_t mask, Site site, const char* why) {
  Thread& thread = *self();
  thread.waits_at = operation, thread.site = site, thread.detail = mask;
  fail(site, "%s with mask 0x%08x: %s", operation, mask, why);
}

Rendezvous& arrive(const char* operation, uint32_t mask, bool same_site, Site site) {
  Thread& thread = *self();
  Warp& warp = *thread.warp;
  if ((mask >> thread.lane & 1) == 0)
    fail_at(operation, mask, site, "the calling lane is outside its own mask");
  for (Rendezvous* open = warp.open; open != nullptr; open = open->next) {
    if (open->mask != mask) continue;
    if (open->operation != operation)
      fail_at(operation, mask, site, "divergent: other lanes wait at another operation");
    if (same_site && (open->site.line != site.line || open->site.file != site.file)) {
      fail_at(operation, mask, site, "divergent: other lanes wait at another call of it");
    }
    open->arrived |= 1u << thread.lane;
    return *open;
  }
  if ((mask & warp.exited) != 0)
    fail_at(operation, mask, site, "a lane in the mask has returned from the kernel");
  if ((mask & ~warp.exists) != 0)
    fail_at(operation, mask, site, "the mask names lanes that the block does not have");
  Rendezvous& opened = *warp.pool;
  warp.pool = opened.next;
  opened.operation = operation;
  opened.site = site;
  opened.mask = mask;
  opened.arrived = 1u << thread.lane;
  opened.next = warp.open;
  warp.open = &opened;
  return opened;
}

bool all_here(const Rendezvous& meeting) { return meeting.arrived == meeting.mask; }

// The last lane closes the meeting and goes on; the others become ready. Any other lane waits for
// that.
void close_or_wait(Rendezvous& meeting) {
  Thread& thread = *self();
  Warp& warp = *thread.warp;
  if (all_here(meeting)) {
    Rendezvous** link = &warp.open;
    while (*link != &meeting) link = &(*link)->next;
    *link = meeting.next;
    meeting.leaving = static_cast<unsigned>(__builtin_popcount(meeting.mask));
    make_ready(warp, meeting.mask & ~(1u << thread.lane));
  } else {
    thread.waits_at = meeting.operation, thread.site = meeting.site, thread.detail = meeting.mask;
    switch_away(true);
    thread.waits_at = nullptr;
  }
}

void leave(Rendezvous& meeting) {
  if (--meeting.leaving != 0) return;
  Warp& warp = *self()->warp;
  meeting.next = warp.pool;
  warp.pool = &meeting;
}

// Rounding inside the tensor core is not modelled: products are exact in float32, sums rounded to
// nearest in order of k.
using Row = float __attribute__((vector_size(32)));

template <int K>
void multiply_tile(const float (&a)[16][K], const Row (&b)[K], Row (&d)[16]) {
  constexpr int kRows = 8;  // at once: their sums do not wait for one another
  for (int row = 0; row < 16; row += kRows) {
    Row sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = d[row + i];
    for (int k = 0; k < K; ++k) {
      for (int i = 0; i < kRows; ++i) sum[i] += a[row + i][k] * b[k];
    }
    for (int i = 0; i < kRows; ++i) d[row + i] = sum[i];
  }
}

template <class T, int Count>
void widen_all(const uint16_t* bits, float* values) {
  for (int i = 0; i < Count; ++i) values[i] = widen(T{bits[i]});
}

// The layouts of PTX's mma.m16n8k16: lane = 4 g + t holds rows g and g + 8, and pairs of neighbours
// along k.
template <class T>
void multiply_16bit(LaneData (&lanes)[kLanes], Row (&d)[16]) {
  alignas(64) uint16_t a_bits[16][16], b_bits[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    const auto& in = lanes[lane].multiply;
    for (int i = 0; i < 4; ++i) {
      uint16_t* pair = &a_bits[g + i % 2 * 8][t + i / 2 * 8];
      pair[0] = static_cast<uint16_t>(in.a[i]);
      pair[1] = static_cast<uint16_t>(in.a[i] >> 16);
    }
    for (int i = 0; i < 2; ++i) {
      b_bits[t + 8 * i][g] = static_cast<uint16_t>(in.b[i]);
      b_bits[t + 8 * i + 1][g] = static_cast<uint16_t>(in.b[i] >> 16);
    }
  }
  alignas(64) float a[16][16];
  Row b[16];
  widen_all<T, 256>(&a_bits[0][0], &a[0][0]);
  widen_all<T, 128>(&b_bits[0][0], reinterpret_cast<float*>(b));
  multiply_tile<16>(a, b, d);
}

// mma.m16n8k8 of tf32: single elements, k = t and t + 4. The lowest 13 bits are not looked at, as
// on the device.
void multiply_tf32(LaneData (&lanes)[kLanes], Row (&d)[16]) {
  alignas(64) float a[16][8];
  Row b[8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto& in = lanes[lane].multiply;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = float_of(in.a[i] & 0xffffe000u);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = float_of(in.b[i] & 0xffffe000u);
  }
  multiply_tile<8>(a, b, d);
}

void multiply_warp(Operand operand, LaneData (&lanes)[kLanes]) {
  Row d[16];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = lanes[lane].multiply.d[i];
  }
  switch (operand) {
    case Operand::kBfloat16:
      multiply_16bit<Bfloat16>(lanes, d);
      break;
    case Operand::kHalf:
      multiply_16bit<Half>(lanes, d);
      break;
    case Operand::kTf32:
      multiply_tf32(lanes, d);
      break;
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i)
      lanes[lane].multiply.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void check_no_one_waits_for(Thread& leaver) {
  for (Rendezvous* open = leaver.warp->open; open != nullptr; open = open->next) {
    if (open->mask >> leaver.lane & 1) {
      fail(open->site, "lane %u of warp %u returned from the kernel while others wait for it at %s",
           leaver.lane, leaver.linear / kLanes, open->operation);
    }
  }
}

void sync_warp(uint32_t mask, Site site) {
  // The whole-warp default is right for the block's last warp too, which may lack lanes.
  Rendezvous& meeting = arrive("__syncwarp", mask & self()->warp->exists, false, site);
  void* token = worker->token(*self()->warp, meeting);
  release(token);
  close_or_wait(meeting);
  acquire(token);
  leave(meeting);
}

uint32_t ballot(const char* operation, uint32_t mask, bool predicate, Site site) {
  Rendezvous& meeting = arrive(operation, mask, true, site);
  meeting.lanes[self()->lane].value = predicate;
  close_or_wait(meeting);
  uint32_t votes = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if (mask >> i & 1) votes |= static_cast<uint32_t>(meeting.lanes[i].value) << i;
  }
  leave(meeting);
  return votes;
}

uint64_t shuffle(const char* operation, uint32_t mask, uint64_t value, unsigned source, Site site) {
  Rendezvous& meeting = arrive(operation, mask, true, site);
  if ((mask >> source & 1) == 0) fail_at(operation, mask, site, "reads a lane outside the mask");
  meeting.lanes[self()->lane].value = value;
  close_or_wait(meeting);
  const uint64_t got = meeting.lanes[source].value;
  leave(meeting);
  return got;
}

void load_matrix(const char* operation, int matrices, bool transposed, const uint4* row,
                 uint32_t* out, Site site) {
  Rendezvous& meeting = arrive(operation, 0xffffffffu, true, site);
  const unsigned lane = self()->lane;
  uint32_t* words = meeting.lanes[lane].words;
  words[0] = row->x, words[1] = row->y, words[2] = row->z, words[3] = row->w;
  close_or_wait(meeting);
  for (int i = 0; i < matrices; ++i) {
    const LaneData* rows = &meeting.lanes[i * 8];
    if (transposed) {
      const unsigned first = lane % 4 * 2, col = lane / 4;
      const uint32_t low = rows[first].words[col / 2] >> col % 2 * 16 & 0xffff;
      const uint32_t high = rows[first + 1].words[col / 2] >> col % 2 * 16 & 0xffff;
      out[i] = high << 16 | low;
    } else {
      out[i] = rows[lane / 4].words[lane % 4];
    }
  }
  leave(meeting);
}

void multiply(Operand operand, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  static const char* const kNames[] = {"mma bf16", "mma f16", "mma tf32"};
  Rendezvous& meeting = arrive(kNames[static_cast<int>(operand)], 0xffffffffu, true, site);
  auto& mine = meeting.lanes[self()->lane].multiply;
  for (int i = 0; i < 4; ++i) mine.a[i] = a[i], mine.d[i] = d[i];
  for (int i = 0; i < 2; ++i) mine.b[i] = b[i];
  if (all_here(meeting)) multiply_warp(operand, meeting.lanes);
  close_or_wait(meeting);
  for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
  leave(meeting);
}

}  // namespace vlmq::emulator
