// e^x over V, for kernels_inl.h and vision_inl.h; included after a vec_<isa>.h, like them.

// To about one unit in the last place on [-87, 88], clamped outside: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of
// degree 6 in r (Taylor, whose first dropped term r^7/5040 is below 2^-27), then 2^n. ln 2 is split in two so that n ln 2
// is subtracted exactly.
static inline V vexp(V x) {
  x = vmin(vmax(x, vset(-87.0f)), vset(88.0f));
  const V n = vround(vmul(x, vset(1.44269504088896341f)));
  V r = vfma(n, vset(-0.693359375f), x);
  r = vfma(n, vset(2.12194440e-4f), r);
  V p = vset(1.0f / 720);
  p = vfma(p, r, vset(1.0f / 120));
  p = vfma(p, r, vset(1.0f / 24));
  p = vfma(p, r, vset(1.0f / 6));
  p = vfma(p, r, vset(0.5f));
  p = vfma(p, r, vset(1.0f));
  p = vfma(p, r, vset(1.0f));
  return vmul(p, vpow2(n));
}
