#include "kernels/conv_composite.h"

#include "kernels/error.h"

namespace ddpm {

ConvDesc without_prologue(ConvDesc d) {
  d.x = {d.x.n, d.in_h(), d.in_w(), d.c()};
  d.c2 = 0;
  d.transform = {};
  d.upsample = false;
  d.residual = d.residual || d.shortcut_c > 0;
  d.shortcut_c = d.shortcut_c2 = 0;
  d.statistics = false;
  return d;
}

In list_input(Backend& backend, const ConvDesc& d, const ConvSlots& s, const ConvLister& lister) {
  DDPM_CHECK(d.transform.affine || !d.transform.any(), "a transform of %s without scale and shift",
             to_string(d.x).c_str());
  const Shape joined{d.x.n, d.x.h, d.x.w, d.c()};
  In x = s.x;
  if (d.transform.any()) {
    GroupNormDesc norm;
    norm.x = d.x;
    norm.c2 = d.c2;
    norm.silu = d.transform.silu;
    norm.dropout = d.transform.dropout;
    const Out out = lister.activation(joined);
    lister.add(backend.group_norm_apply(norm, s.x, s.x2, s.scale_shift, s.state, out));
    x = {out.slot};
  } else if (d.c2 > 0) {
    const Out out = lister.activation(joined);
    lister.add(backend.concat(d.x, d.c2, s.x, s.x2, out));
    x = {out.slot};
  }
  if (d.upsample) {
    const Out out = lister.activation({d.x.n, d.in_h(), d.in_w(), d.c()});
    lister.add(backend.upsample(joined, x, out));
    x = {out.slot};
  }
  return x;
}

void list_forward(Backend& backend, const ConvDesc& d, ConvSlots s, Out y,
                  const ConvLister& lister) {
  if (d.shortcut_c > 0) {
    ConvDesc one;
    one.x = d.y();
    one.x.c = d.shortcut_c;
    one.c2 = d.shortcut_c2;
    one.k = d.k;
    one.r = one.s = 1;
    one.pad_top = one.pad_left = one.pad_bottom = one.pad_right = 0;
    one.bias = static_cast<bool>(s.shortcut_bias);
    one.residual = d.residual;
    ConvSlots slots;
    slots.x = s.shortcut;
    slots.x2 = s.shortcut2;
    slots.filter = s.shortcut_filter;
    slots.bias = s.shortcut_bias;
    slots.residual = s.residual;
    const Out sum = lister.activation(d.y());
    list_forward(backend, one, slots, sum, lister);
    s.residual = {sum.slot};
  }
  const ConvDesc plain = without_prologue(d);
  ConvSlots slots;
  slots.x = list_input(backend, d, s, lister);
  slots.bias = s.bias;
  slots.sample_bias = s.sample_bias;
  slots.residual = s.residual;
  slots.filter = lister.filter(plain, s.filter);
  auto call = backend.conv_forward(plain, slots, y, {});
  DDPM_CHECK(call.has_value(), "the backend declines a plain convolution");
  call->macs = plain.y().count() * (plain.filter().count() / plain.k);
  lister.add(*std::move(call));
}

}  // namespace ddpm
