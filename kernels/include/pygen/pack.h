// N values handled as one: what the row arithmetic is written over. T is a vector on a CPU and a float on a GPU.
#pragma once

#include "pygen/lanes.h"

namespace pygen {
namespace {

template <class T, int N>
struct Pack {
  T v[N];
};

// What comparing packs gives: a vector of masks, or a bool, for each of their values.
template <class T, int N>
struct PackMask {
  decltype(T{} < T{}) v[N];
};

template <class T, int N>
PYGEN_INLINE Pack<T, N> operator+(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> operator-(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = a.v[i] - b.v[i];
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> operator*(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = a.v[i] * b.v[i];
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> operator/(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = a.v[i] / b.v[i];
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> operator-(const Pack<T, N>& a) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = -a.v[i];
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> sqrt(const Pack<T, N>& a) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = sqrt(a.v[i]);
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> min(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = min(a.v[i], b.v[i]);
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> max(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = max(a.v[i], b.v[i]);
  return r;
}
template <class T, int N>
PYGEN_INLINE PackMask<T, N> operator<(const Pack<T, N>& a, const Pack<T, N>& b) {
  PackMask<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = a.v[i] < b.v[i];
  return r;
}
template <class T, int N>
PYGEN_INLINE PackMask<T, N> operator>(const Pack<T, N>& a, const Pack<T, N>& b) {
  return b < a;
}
template <class T, int N>
PYGEN_INLINE PackMask<T, N> is_nan(const Pack<T, N>& a) {
  PackMask<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = a.v[i] != a.v[i];
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> select(const PackMask<T, N>& condition, const Pack<T, N>& yes, const Pack<T, N>& no) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = select(condition.v[i], yes.v[i], no.v[i]);
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> fma(const Pack<T, N>& a, const Pack<T, N>& b, const Pack<T, N>& c) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = fma(a.v[i], b.v[i], c.v[i]);
  return r;
}
template <class T, int N>
PYGEN_INLINE Pack<T, N> splat(float value, const Pack<T, N>&) {
  Pack<T, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = splat(value, T{});
  return r;
}

}  // namespace
}  // namespace pygen
