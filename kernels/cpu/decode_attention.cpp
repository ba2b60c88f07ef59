#include "pygen/decode_attention.h"

#include "pygen/exp.h"
#include "pygen/token_row.h"
#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

inline constexpr int kRows = 8;                      // of a group's queries, that pass over a split together
inline constexpr int kTile = kLanes == 16 ? 16 : 4;  // scores that are made together
inline constexpr int64_t kAheadBytes = 8192;         // that are fetched before they are read
inline constexpr int64_t kMostAhead = 256;           // rows

// ---- Sixteen lanes on every instruction set ------------------------------------------------------------------------

inline constexpr int kVectors = kPartialSums / kLanes;
using Sixteen = Pack<F32, kVectors>;

PYGEN_INLINE Sixteen load_floats(const float* from) { return load_bytes<Sixteen>(from); }
PYGEN_INLINE void store_floats(float* to, const Sixteen& x) { std::memcpy(to, &x, sizeof x); }

// Groups of 2 kWidth lanes are folded to kWidth, those of a and of b in turn.
template <int kWidth, int... kLane>
PYGEN_INLINE F32 fold(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  constexpr auto from = [](int lane) {
    const int group = lane / (2 * kWidth) * 2 * kWidth, within = lane % (2 * kWidth);
    return within < kWidth ? group + within : kLanes + group + within - kWidth;
  };
  return __builtin_shufflevector(a, b, from(kLane)...) + __builtin_shufflevector(a, b, (from(kLane) + kWidth)...);
}
// The sum by halves of each of N vectors' lanes: vector i's stands in lane i * kLanes / N.
template <int kWidth = kLanes / 2, int N>
PYGEN_INLINE F32 add_lanes(const F32 (&x)[N]) {
  constexpr int kHalf = N == 1 ? 1 : N / 2;
  if constexpr (kWidth == 0) {
    return x[0];
  } else {
    F32 folded[kHalf];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      folded[i] = fold<kWidth>(x[i], x[N == 1 ? i : i + kHalf], std::make_integer_sequence<int, kLanes>{});
    }
    return add_lanes<kWidth / 2>(folded);
  }
}
template <int N>
PYGEN_INLINE F32 add_lanes(const Sixteen (&x)[N]) {
  F32 folded[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    Sixteen t = x[i];
    for (int n = kVectors / 2; n > 0; n /= 2) {
      for (int j = 0; j < n; ++j) t.v[j] += t.v[j + n];
    }
    folded[i] = t.v[0];
  }
  return add_lanes(folded);
}
PYGEN_INLINE float sum(const Sixteen& x) {
  const Sixteen one[1] = {x};
  return add_lanes(one)[0];
}
PYGEN_INLINE float largest(F32 x) {
  float most = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) most = x[lane] > most ? x[lane] : most;
  return most;
}

// ---- What a row of the cache is read by ----------------------------------------------------------------------------

// A step takes sixteen elements; of bfloat16 sixteen pairs, the second of each pair first: so does vdpbf16ps, which
// multiplies and adds them one after the other.
template <DType kDType>
struct Step {
  static constexpr int kParts = kDType == DType::kBFloat16 ? 2 : 1;
  static constexpr int kCount = kParts * kPartialSums;
  static constexpr int64_t kBytes = kCount * size_of(kDType);
  Sixteen part[kParts];

  PYGEN_INLINE static Step load(const char* from) {
    Step x;
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kParts == 2) {
        const U32 pairs = load_bytes<U32>(from + i * sizeof(U32));
        x.part[0].v[i] = from_unsigned(pairs & 0xffff0000u);
        x.part[1].v[i] = from_unsigned(pairs << 16);
      } else {
        x.part[0].v[i] = pygen::load<kDType>(from + i * kLanes * size_of(kDType));
      }
    }
    return x;
  }
  // How elements stand in parts, from their own order.
  PYGEN_INLINE static int64_t place(int64_t i) {
    return kParts == 1 ? i : i / kCount * kCount + (1 - i % 2) * kPartialSums + i % kCount / 2;
  }
};

// The same of what products are made of: parts and queries in float32, or where both are bfloat16 the pairs themselves.
template <DType kDType>
struct Product {
  using Query = float;
  Step<kDType> x;
  PYGEN_INLINE static Product load(const char* from) { return {Step<kDType>::load(from)}; }
  PYGEN_INLINE static Product query(const float* from) {
    Product q;
    for (int p = 0; p < Step<kDType>::kParts; ++p) q.x.part[p] = load_floats(from + p * kPartialSums);
    return q;
  }
  PYGEN_INLINE static Sixteen add(const Product& q, const Product& k, Sixteen sum) {
    for (int p = 0; p < Step<kDType>::kParts; ++p) sum = fma(q.x.part[p], k.x.part[p], sum);
    return sum;
  }
};
#if defined(__AVX512BF16__)
struct PairProduct {
  using Query = uint16_t;
  __m512bh x;
  PYGEN_INLINE static PairProduct load(const void* from) { return {load_bytes<__m512bh>(from)}; }
  PYGEN_INLINE static PairProduct query(const uint16_t* from) { return load(from); }
  PYGEN_INLINE static Sixteen add(const PairProduct& q, const PairProduct& k, Sixteen sum) {
    return {_mm512_dpbf16_ps(sum.v[0], q.x, k.x)};
  }
};
#endif

// The first bytes of a step; the others are 0.
struct alignas(64) PartialStep {
  char bytes[64];
  PYGEN_INLINE PartialStep(const char* from, int64_t count) {
#if defined(__AVX512BW__)
    _mm512_store_si512(bytes, _mm512_maskz_loadu_epi8((uint64_t{1} << count) - 1, from));
#else
    std::memset(bytes, 0, sizeof bytes);
    std::memcpy(bytes, from, count);
#endif
  }
};

// Fetches what is read after a step at `from` of `row`: its bytes of the row `ahead`, and where a row begins, the first
// line of one that lies far behind: to find a page's address takes longer than to fetch a line of it.
template <int64_t kBytes>
PYGEN_INLINE void fetch(const char* const* row, int64_t ahead, int64_t from) {
  for (int64_t i = 0; i < kBytes; i += 64) {
    if (kBytes >= 64 || from % 64 == 0) __builtin_prefetch(row[ahead] + from + i);
  }
  if (from == 0) __builtin_prefetch(row[3 * ahead]);
}

// ---- One split after another ---------------------------------------------------------------------------------------

template <DType kDType, class Multiply>
class Attention {
 public:
  explicit Attention(const DecodeAttentionArgs& args)
      : args_(args),
        row_bytes_(args.cache.head_dim * size_of(kDType)),
        whole_(row_bytes_ / kStepBytes * kStepBytes),
        padded_(padded_dim(args)),
        rows_(args.q_len * args.group),
        ahead_(std::clamp<int64_t>(kAheadBytes / row_bytes_, 1, kMostAhead / 4)) {
    std::memset(nothing_, 0, row_bytes_);
  }

  void run(int64_t begin, int64_t end) {
    WorkItem item(args_);
    item.move(args_, begin);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = item.sequence, head = item.head();
      const int64_t partial = partial_row(args_, sequence, head, item.split());
      locate(item);
      if (i + 1 < end) {
        item.move(args_, 1);
        look_ahead(item);
      }
      for (int64_t row = 0; row < rows_; row += kRows) {
        const int count = static_cast<int>(std::min<int64_t>(rows_ - row, kRows));
        fetches_ = row == 0;
        load_queries(sequence, head, row, count);
        score(count);
        weigh(head, row, count, partial + row);
        add_values(row, count, partial + row);
      }
    }
  }

 private:
  static constexpr int64_t kSize = size_of(kDType), kStepBytes = Step<kDType>::kBytes;

  // The keys of the split that a query sees, counted from the split's first.
  KeyRange seen_by(int64_t query) const {
    const KeyRange keys = keys_of(args_, length_, query);
    return KeyRange{keys.begin - first_, keys.end - first_}.within(0, kSplitKeys);
  }

  void locate(const WorkItem& item) {
    const KvCache& cache = args_.cache;
    length_ = kv_length(cache, item.sequence);
    first_ = (item.splits.first + item.split()) * kSplitKeys;
    keys_ = {seen_by(0).begin, std::min<int64_t>(length_ - first_, kSplitKeys)};
    any_missing_ = false;
    const int64_t count = keys_.end - keys_.begin;
    each_piece(item, keys_, [&](int64_t j, KvSlot slot, int64_t here) {
      const char** to = rows_read_ + j - keys_.begin;
      if (slot.page < 0) {
        any_missing_ = true;
        to[0] = to[count] = nothing_;
        if (kDType == DType::kInt8) k_scale_[j] = v_scale_[j] = 0.0f;
        return;
      }
      put_rows(cache.k, slot, item.head(), here, to);
      put_rows(cache.v, slot, item.head(), here, to + count);
      if (kDType != DType::kInt8) return;
      for (int64_t i = 0; i < here; ++i) {
        k_scale_[j + i] = kv_scale(cache.k, slot, item.head())[i * cache.k.scale_stride[2]];
        v_scale_[j + i] = kv_scale(cache.v, slot, item.head())[i * cache.v.scale_stride[2]];
      }
    });
    std::fill_n(rows_read_ + 2 * count, kMostAhead + kTile, nothing_);
  }
  // The rows that are read after the split's own.
  void look_ahead(const WorkItem& next) {
    const int64_t first = (next.splits.first + next.split()) * kSplitKeys;
    const int64_t length = kv_length(args_.cache, next.sequence);
    const int64_t begin = std::max<int64_t>(0, keys_of(args_, length, 0).begin - first);
    const char** to = rows_read_ + 2 * (keys_.end - keys_.begin);
    each_piece(next, KeyRange{begin, begin + kMostAhead}.within(0, length - first),
               [&](int64_t j, KvSlot slot, int64_t here) {
                 if (slot.page >= 0) put_rows(args_.cache.k, slot, next.head(), here, to + j - begin);
               });
  }
  // Calls visit(j, slot, count) for every piece of a split's keys that lies in one page.
  template <class Visit>
  void each_piece(const WorkItem& item, KeyRange keys, Visit visit) const {
    const int64_t first = (item.splits.first + item.split()) * kSplitKeys;
    for (int64_t j = keys.begin, here; j < keys.end; j += here) {
      const KvSlot slot = kv_slot(args_.cache, item.sequence, first + j);
      here = slot.page < 0 ? 1 : std::min(keys.end - j, args_.cache.page_size - slot.slot);
      visit(j, slot, here);
    }
  }
  static void put_rows(const KvTensor& tensor, KvSlot slot, int64_t head, int64_t count, const char** to) {
    const char* row = kv_row(tensor, slot, head);
    for (int64_t i = 0; i < count; ++i) to[i] = row + i * tensor.stride[2] * kSize;
  }

  // Row i * group + g is query i of the group's head g.
  void load_queries(int64_t sequence, int64_t head, int64_t row, int count) {
    const Operand& q = args_.q;
    const int64_t size = size_of(q.dtype), head_dim = args_.cache.head_dim;
    for (int r = 0; r < count; ++r, ++row) {
      const int64_t offset = sequence * q.stride[0] + (head * args_.group + row % args_.group) * q.stride[1] +
                             row / args_.group * q.stride[2];
      alignas(64) char copy[kMaxHeadDim * sizeof(float)];
      copy_elements(copy, 1, static_cast<const char*>(q.data) + offset * size, q.stride[3], head_dim, size);
      std::memset(copy + head_dim * size, 0, (kMaxHeadDim - head_dim) * size);
      if constexpr (sizeof(typename Multiply::Query) == sizeof(uint16_t)) {
        std::memcpy(q_[r], copy, padded_ * size);
      } else {
        alignas(64) float floats[kMaxHeadDim];
        for (int64_t d = 0; d < padded_; d += kStrip) {
          const Strip strip = load_strip(copy + d * size, q.dtype);
          std::memcpy(floats + d, &strip, sizeof strip);
        }
        for (int64_t d = 0; d < padded_; ++d) q_[r][Step<kDType>::place(d)] = floats[d];
      }
    }
  }

  void score(int count) {
    for (int64_t j = keys_.begin; j < keys_.end; j += kTile) {
      int row = 0;
      for (; row + 4 <= count; row += 4) {
        for (int i = 0; i < kTile; i += kTile / 4) score_tile<4, kTile / 4>(row, j + i);
      }
      if (row + 2 <= count) {
        for (int i = 0; i < kTile; i += kTile / 2) score_tile<2, kTile / 2>(row, j + i);
        row += 2;
      }
      if (row < count) score_tile<1, kTile>(row, j);
    }
  }

  // q k of a few rows and keys. What is read after the last key is not used.
  template <int kRowCount, int kKeyCount>
  void score_tile(int row, int64_t j) {
    const char* const* k = rows_read_ + j - keys_.begin;
    const bool fetches = fetches_ && row == 0;
    Sixteen sums[kTile] = {};
    const auto add = [&](int64_t at, auto load) {
      Multiply q[kRowCount];
#pragma GCC unroll 4
      for (int r = 0; r < kRowCount; ++r) q[r] = Multiply::query(q_[row + r] + at / kSize);
#pragma GCC unroll 16
      for (int i = 0; i < kKeyCount; ++i) {
        if (fetches) fetch<kStepBytes>(k + i, ahead_, at);
        const Multiply key = load(k[i] + at);
#pragma GCC unroll 4
        for (int r = 0; r < kRowCount; ++r) {
          sums[r * kKeyCount + i] = Multiply::add(q[r], key, sums[r * kKeyCount + i]);
        }
      }
    };
    for (int64_t at = 0; at < whole_; at += kStepBytes) add(at, [](const char* from) { return Multiply::load(from); });
    if (whole_ < row_bytes_) {
      add(whole_, [&](const char* from) { return Multiply::load(PartialStep(from, row_bytes_ - whole_).bytes); });
    }
    const F32 lanes = add_lanes(sums);
    alignas(64) float scores[kLanes];
    std::memcpy(scores, &lanes, sizeof lanes);
    for (int r = 0; r < kRowCount; ++r) {
      for (int i = 0; i < kKeyCount; ++i) weights_[row + r][j + i] = scores[(r * kKeyCount + i) * (kLanes / kTile)];
    }
  }

  // From scores to weights, their maximum and their sum.
  void weigh(int64_t head, int64_t row, int count, int64_t partial) {
    const int64_t begin = keys_.begin / kPartialSums * kPartialSums;
    I32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    for (int r = 0; r < count; ++r, ++row, ++partial) {
      float* weights = weights_[r];
      const int64_t query = row / args_.group, query_head = head * args_.group + row % args_.group;
      const KeyRange keys = seen_by(query);
      const int32_t first = static_cast<int32_t>(keys.begin), last = static_cast<int32_t>(keys.end);
      const int32_t end = (last + kPartialSums - 1) / kPartialSums * kPartialSums;
      const float slope = args_.alibi_slopes == nullptr ? 0.0f : args_.alibi_slopes[query_head * args_.alibi_stride];
      const int64_t position = length_ - args_.q_len + query - first_;
      F32 most = splat(-kInfinity, F32{});
      for (int64_t j = begin; j < end; j += kLanes) {
        F32 s = load_bytes<F32>(weights + j) * args_.scale;
        if (kDType == DType::kInt8) s *= load_bytes<F32>(k_scale_ + j);
        if (args_.soft_cap != 0.0f) s = soft_capped(s, args_.soft_cap);
        if (args_.alibi_slopes != nullptr) {
          s = fma(splat(slope, s), to_float(lane + static_cast<int32_t>(j - position)), s);
        }
        const I32 key = lane + static_cast<int32_t>(j);
        s = select((key >= first) & (key < last), s, splat(-kInfinity, s));
        std::memcpy(weights + j, &s, sizeof s);
        most = max(most, s);
      }
      float maximum = largest(most);
      if (any_missing_) {
        maximum = -kInfinity;
        for (int32_t j = first; j < last; ++j) {
          if (rows_read_[j - keys_.begin] == nothing_) weights[j] = -kInfinity;
          maximum = weights[j] > maximum ? weights[j] : maximum;
        }
      }
      const float base = maximum == -kInfinity ? 0.0f : maximum;
      Sixteen total = {};
      for (int64_t j = begin; j < end; j += kPartialSums) {
        for (int i = 0; i < kVectors; ++i) {
          const int64_t at = j + i * kLanes;
          F32 p = exp(load_bytes<F32>(weights + at) - base);
          total.v[i] += p;
          if (kDType == DType::kInt8) p *= load_bytes<F32>(v_scale_ + at);
          std::memcpy(weights + at, &p, sizeof p);
        }
      }
      args_.statistics[2 * partial] = maximum;
      args_.statistics[2 * partial + 1] = sum(total);
    }
  }

  void add_values(int64_t row, int count, int64_t partial) {
    float* sums = args_.partials + partial * padded_;
    std::fill(sums, sums + count * padded_, 0.0f);
    for (int64_t j = keys_.begin / kRunKeys * kRunKeys; j < keys_.end; j += kRunKeys) {
      const auto run_of = [&](int r) { return seen_by((row + r) / args_.group).within(j, j + kRunKeys); };
      const auto alike = [&](int r, int n) {
        const KeyRange a = run_of(r), b = run_of(r + n - 1);
        return r + n <= count && a.begin == b.begin && a.end == b.end;
      };
      for (int r = 0; r < count;) {
        if (alike(r, 4)) {
          add_run<4>(r, run_of(r), sums);
          r += 4;
        } else if (alike(r, 2)) {
          add_run<2>(r, run_of(r), sums);
          r += 2;
        } else {
          add_run<1>(r, run_of(r), sums);
          r += 1;
        }
      }
    }
  }

  template <int kRowCount>
  void add_run(int row, KeyRange keys, float* sums) {
    constexpr int kParts = Step<kDType>::kParts;
    constexpr int kSteps = (kLanes == 16 ? 4 : 4 / kRowCount) / kParts;
    sums += row * padded_;
    int64_t at = 0;
    if constexpr (kSteps > 0) {
      for (; at + kSteps * kStepBytes <= whole_; at += kSteps * kStepBytes) {
        add_steps<kRowCount, kSteps>(row, keys, at, sums + at / kSize);
      }
    }
    for (; at < row_bytes_; at += kStepBytes) add_steps<kRowCount, 1>(row, keys, at, sums + at / kSize);
  }

  template <int kRowCount, int kSteps>
  void add_steps(int row, KeyRange keys, int64_t at, float* sums) {
    constexpr int kParts = Step<kDType>::kParts;
    const char* const* v = rows_read_ + keys_.end - 2 * keys_.begin;
    const bool fetches = fetches_ && row == 0;
    Sixteen total[kRowCount][kSteps * kParts] = {};
    const auto add = [&](auto load) {
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        if (fetches) fetch<kSteps * kStepBytes>(v + j, ahead_, at);
        Step<kDType> value[kSteps];
#pragma GCC unroll 4
        for (int i = 0; i < kSteps; ++i) value[i] = load(v[j] + at + i * kStepBytes);
#pragma GCC unroll 4
        for (int r = 0; r < kRowCount; ++r) {
          const Sixteen p = splat(weights_[row + r][j], Sixteen{});
#pragma GCC unroll 4
          for (int i = 0; i < kSteps; ++i) {
            for (int n = 0; n < kParts; ++n) {
              total[r][i * kParts + n] = fma(p, value[i].part[n], total[r][i * kParts + n]);
            }
          }
        }
      }
    };
    if (kSteps > 1 || at < whole_) {
      add([](const char* from) { return Step<kDType>::load(from); });
    } else {
      add([&](const char* from) { return Step<kDType>::load(PartialStep(from, row_bytes_ - whole_).bytes); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kSteps * kParts; ++i) {
        float* to = sums + r * padded_ + i * kPartialSums;
        store_floats(to, load_floats(to) + total[r][i]);
      }
    }
  }

  const DecodeAttentionArgs& args_;
  const int64_t row_bytes_, whole_, padded_;  // whole_: what its whole steps hold
  const int64_t rows_;                        // of a group's queries
  const int64_t ahead_;                       // rows that are fetched before they are read

  // Of the split at hand.
  int64_t first_, length_;  // its first position, the sequence's length
  KeyRange keys_;           // that any query sees
  bool any_missing_;        // whether a key lies in a page that does not exist: its row is nothing_
  // Rows in the order of reading: the split's keys, its values, the next split's first keys.
  const char* rows_read_[2 * kSplitKeys + kMostAhead + kTile];
  bool fetches_;  // the first queries do, for those that come after
  alignas(64) float k_scale_[kSplitKeys];
  float v_scale_[kSplitKeys];
  alignas(64) typename Multiply::Query q_[kRows][kMaxHeadDim];
  alignas(64) float weights_[kRows][kSplitKeys + kTile];
  char nothing_[kMaxHeadDim * sizeof(float)];
};

template <DType kDType>
void attend(const DecodeAttentionArgs& args, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if constexpr (kDType == DType::kBFloat16) {
    if (args.q.dtype == kDType) return Attention<kDType, PairProduct>(args).run(begin, end);
  }
#endif
  Attention<kDType, Product<kDType>>(args).run(begin, end);
}

}  // namespace

void decode_attention(const DecodeAttentionArgs& args, int64_t begin, int64_t end) {
  switch (args.cache.k.dtype) {
    case DType::kFloat32:
      return attend<DType::kFloat32>(args, begin, end);
    case DType::kBFloat16:
      return attend<DType::kBFloat16>(args, begin, end);
    case DType::kFloat16:
      return attend<DType::kFloat16>(args, begin, end);
    case DType::kInt8:
      return attend<DType::kInt8>(args, begin, end);
    case DType::kBool:
      break;
  }
}

void decode_attention_merge(const DecodeAttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t head_dim = args.cache.head_dim, padded = padded_dim(args), heads = args.cache.kv_heads * args.group;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t query = i % args.q_len, head = i / args.q_len % heads, sequence = i / args.q_len / heads;
    const int64_t splits = splits_of(args, kv_length(args.cache, sequence)).count;
    const int64_t stride = args.q_len * args.group;
    const int64_t first = partial_row(args, sequence, head / args.group, 0) + query * args.group + head % args.group;

    const float sink = args.sinks == nullptr ? -kInfinity : args.sinks[head * args.sinks_stride];
    float most = sink;
    for (int64_t s = 0; s < splits; ++s) {
      const float m = args.statistics[2 * (first + s * stride)];
      most = m > most ? m : most;
    }
    const float base = most == -kInfinity ? 0.0f : most;
    alignas(64) float sums[kMaxHeadDim] = {};
    float total = exp_one(sink - base);
    for (int64_t s = 0; s < splits; ++s) {
      const float* statistics = args.statistics + 2 * (first + s * stride);
      const float* partial = args.partials + (first + s * stride) * padded;
      const float factor = exp_one(statistics[0] - base);
      total += factor * statistics[1];
      for (int64_t d = 0; d < padded; d += kPartialSums) {
        store_floats(sums + d, fma(splat(factor, Sixteen{}), load_floats(partial + d), load_floats(sums + d)));
      }
    }

    if (args.cache.k.dtype == DType::kBFloat16) {
      alignas(64) float parts[kMaxHeadDim];
      std::memcpy(parts, sums, sizeof sums);
      for (int64_t d = 0; d < padded; ++d) sums[d] = parts[Step<DType::kBFloat16>::place(d)];
    }
    const Operand& out = args.out;
    const int64_t offset = sequence * out.stride[0] + head * out.stride[1] + query * out.stride[2];
    char copy[kMaxHeadDim * sizeof(float)];
    for (int64_t d = 0; d < padded; d += kStrip) {
      Strip strip;
      std::memcpy(&strip, sums + d, sizeof strip);
      strip = total == 0.0f ? Strip{} : strip / splat(total, strip);
      store_strip(copy + d * size_of(out.dtype), out.dtype, strip);
    }
    copy_elements(static_cast<char*>(out.data) + offset * size_of(out.dtype), out.stride[3], copy, 1, head_dim,
                  size_of(out.dtype));
    if (args.lse != nullptr) {
      args.lse[sequence * args.lse_stride[0] + head * args.lse_stride[1] + query * args.lse_stride[2]] =
          total == 0.0f ? -kInfinity : static_cast<float>(base + log_double(total));
    }
  }
}

}  // namespace pygen::PYGEN_ISA
