#include "engine/graph.h"

#include <set>
#include <utility>

namespace ddpm {

Graph::Graph(Backend& backend, Mode mode) : backend_(&backend), mode_(mode) {
  state_ = persistent_bytes(sizeof(StepState), "state");
}

Tensor Graph::define(TensorSpec info) {
  tensors_.push_back(std::move(info));
  passed_on_.push_back(false);
  written_.push_back(false);
  return {static_cast<int>(tensors_.size()) - 1};
}

Tensor Graph::tensor(const Shape& shape, DType dtype) {
  return define({.shape = shape,
                 .dtype = dtype,
                 .name = scope_,
                 .bytes = static_cast<size_t>(shape.count()) * size_of(dtype)});
}

Tensor Graph::bytes(size_t count) {
  return define({.shape = {}, .dtype = DType::kU8, .name = scope_, .bytes = count});
}

Tensor Graph::persistent(const Shape& shape, DType dtype, const std::string& name) {
  return define({.shape = shape,
                 .dtype = dtype,
                 .name = name,
                 .kind = TensorKind::kPersistent,
                 .bytes = static_cast<size_t>(shape.count()) * size_of(dtype)});
}

size_t Graph::bytes_moved(const Step& step) const {
  std::set<int> slots;
  for (In in : step.call.reads) slots.insert(in.slot);
  for (Out out : step.call.writes) slots.insert(out.slot);
  size_t total = 0;
  for (int slot : slots)
    if (slot >= 0 && info({slot}).kind != TensorKind::kHeld) total += info({slot}).bytes;
  return total;
}

int64_t Graph::macs() const {
  int64_t total = 0;
  for (size_t i = 0; i < forward_steps_.value_or(steps().size()); ++i)
    total += steps()[i].call.macs;
  return total;
}

Tensor Graph::held(const Shape& shape, DType dtype, const std::string& name) {
  return define({.shape = shape,
                 .dtype = dtype,
                 .name = name,
                 .kind = TensorKind::kHeld,
                 .bytes = static_cast<size_t>(shape.count()) * size_of(dtype)});
}

Tensor Graph::persistent_bytes(size_t count, const std::string& name) {
  return define({.shape = {},
                 .dtype = DType::kU8,
                 .name = scope_.empty() ? name : scope_ + "." + name,
                 .kind = TensorKind::kPersistent,
                 .bytes = count});
}

Tensor Graph::constant(std::vector<float> values, int columns, const std::string& name) {
  const int rows = static_cast<int>(values.size()) / columns;
  const Tensor t = persistent({rows, 1, 1, columns}, DType::kF32, name);
  DDPM_CHECK(info(t).bytes == values.size() * sizeof(float),
             "constant %s: %zu values in rows of %d", name.c_str(), values.size(), columns);
  constants_.emplace(t.id, std::move(values));
  return t;
}

Tensor Graph::parameter(const std::string& name, const Shape& shape, int rank,
                        std::vector<ParamPiece> pieces) {
  const std::string full = scope_.empty() ? name : scope_ + "." + name;
  TensorSpec info{.shape = shape,
                  .name = full,
                  .kind = TensorKind::kArena,
                  .bytes = static_cast<size_t>(shape.count()) * sizeof(float),
                  .arena = Arena::kWeights,
                  .requires_grad = training()};
  info.param = params_.add({full, shape, rank, std::move(pieces)});
  const Tensor weight = define(info);
  if (training()) {
    info.arena = Arena::kGradients;
    info.requires_grad = false;
    gradients_[weight.id] = define(info);
  }
  return weight;
}

Tensor Graph::compute_weight(Tensor weight) {
  if (backend().compute_type() == DType::kF32) return weight;
  const auto found = shadows_.find(weight.id);
  if (found != shadows_.end()) return found->second;
  TensorSpec spec = info(weight);
  spec.dtype = backend().compute_type();
  spec.bytes = static_cast<size_t>(spec.shape.count()) * size_of(spec.dtype);
  spec.arena = Arena::kShadow;
  spec.requires_grad = false;
  return shadows_[weight.id] = define(spec);
}

Tensor Graph::arena(Arena which) {
  TensorSpec spec{.shape = {}, .name = "arena", .kind = TensorKind::kArena, .arena = which};
  if (which == Arena::kShadow) {
    spec.dtype = backend().compute_type();
    if (spec.dtype == DType::kF32) return {};
  }
  spec.bytes = static_cast<size_t>(params_.arena_size()) * size_of(spec.dtype);
  return define(spec);
}

void Graph::set_requires_grad(Tensor t, bool value) {
  tensors_.at(static_cast<size_t>(t.id)).requires_grad = value && training();
}

void Graph::keep(Tensor t) {
  TensorSpec& spec = tensors_.at(static_cast<size_t>(t.id));
  DDPM_CHECK(spec.kind == TensorKind::kPlanned, "tensor %d is kept already", t.id);
  spec.kind = TensorKind::kPersistent;
}

void Graph::add(Call call, Phase phase) {
  steps_[static_cast<size_t>(phase)].push_back({std::move(call), scope_});
}

void Graph::insert(size_t index, Call call) {
  std::vector<Step>& steps = steps_[static_cast<size_t>(Phase::kStep)];
  steps.insert(steps.begin() + static_cast<std::ptrdiff_t>(index), {std::move(call), scope_});
}

void Graph::add_part_end(size_t part, Call call) {
  DDPM_CHECK(call.workspace == 0, "%s at the end of a part has a workspace", call.op);
  if (part_ends_.size() <= part) part_ends_.resize(part + 1);
  part_ends_[part].push_back(std::move(call));
}

Graph::Scope::Scope(Graph& graph, const std::string& name)
    : graph_(graph), length_(graph.scope_.size()) {
  if (!graph.scope_.empty()) graph.scope_ += '.';
  graph.scope_ += name;
}

void Graph::on_backward(Backward backward) {
  if (training()) tape_.push_back({std::move(backward), scope_});
}

void Graph::backward() {
  if (!forward_steps_) forward_steps_ = steps().size();
  const std::string outer = scope_;
  while (!tape_.empty()) {
    TapeEntry entry = std::move(tape_.back());
    tape_.pop_back();
    scope_ = std::move(entry.scope);
    entry.backward(*this);
  }
  scope_ = outer;
}

GradOut Graph::grad_out(Tensor x) {
  DDPM_CHECK(!complete_.contains(x.id), "the gradient of tensor %d takes no more", x.id);
  const TensorSpec& of = info(x);
  const auto found = gradients_.find(x.id);
  if (found == gradients_.end()) {
    const Tensor gradient = tensor(of.shape, of.dtype);
    gradients_[x.id] = gradient;
    return {gradient, Write::kOverwrite};
  }
  const Tensor gradient = found->second;
  if (of.kind != TensorKind::kArena) return {gradient, Write::kAccumulate};
  // A parameter's gradient exists from the start; its first writer is marked as such here.
  const bool written = written_[static_cast<size_t>(gradient.id)];
  written_[static_cast<size_t>(gradient.id)] = true;
  return {gradient, written ? Write::kAccumulate : Write::kOverwrite};
}

Tensor Graph::grad_buffer(Tensor x) {
  if (!gradients_.contains(x.id)) gradients_[x.id] = tensor(shape(x));
  return gradients_[x.id];
}

void Graph::set_grad(Tensor x, Tensor gradient) {
  DDPM_CHECK(!gradients_.contains(x.id), "tensor %d has a gradient already", x.id);
  gradients_[x.id] = gradient;
  complete_.insert(x.id);
}

Tensor Graph::grad(Tensor y) const {
  const auto found = gradients_.find(y.id);
  return found == gradients_.end() ? Tensor{} : found->second;
}

void Graph::pass_grad(Tensor y, Tensor x) {
  if (!requires_grad(x)) return;
  const Tensor dy = grad(y);
  DDPM_CHECK(dy, "tensor %d has no gradient to pass on", y.id);
  const size_t owner = static_cast<size_t>(y.id);
  if (!gradients_.contains(x.id) && !passed_on_[owner] && info(dy).kind == TensorKind::kPlanned) {
    gradients_[x.id] = dy;
    passed_on_[owner] = true;
    return;
  }
  const GradOut dx = grad_out(x);
  add(backend().copy(shape(x).count(), info(dy).dtype, dy, dx.tensor, dx.write));
}

Tensor Graph::statistics(Tensor x) {
  const auto found = statistics_.find(x.id);
  if (found != statistics_.end()) return found->second;
  const StatsDesc desc{shape(x)};
  const Tensor stats = tensor({1, 1, 1, static_cast<int>(desc.count())});
  add(backend().channel_stats(desc, x, stats));
  statistics_[x.id] = stats;
  return stats;
}

void Graph::set_statistics(Tensor x, Tensor statistics) { statistics_[x.id] = statistics; }

}  // namespace ddpm
