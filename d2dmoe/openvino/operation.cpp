// `DynamicFFN`: one converted feed-forward layer as an OpenVINO operation, computed by the native library.
//
// Inputs: tokens (…, d) in fp32, the number of a budget (scalar, i32), and all of the layer's tensors as bytes. In these,
// the tensor of `tensors` number i begins at `offsets` number i, or, for budget b, b times `strides` number i behind
// that. Lists are texts with spaces, which operations in Python can have as well: python_operation.py does the same.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#if __has_include(<tbb/parallel_for.h>)
#define D2DMOE_TBB 1
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#endif

#include "openvino/core/extension.hpp"
#include "openvino/core/op_extension.hpp"
#include "openvino/op/op.hpp"

#include "layer.h"

namespace d2dmoe {

constexpr size_t LINE = 64;  // bytes of a cache line: vectors that lie across two of them take twice as long to read

// Where in the layer a pointer to this tensor goes.
size_t offset_of(const std::string& name) {
    static const std::map<std::string, size_t> offsets = {
        {"router_hidden", offsetof(D2dmoeLayer, router_hidden)}, {"router_score", offsetof(D2dmoeLayer, router_score)},
        {"up", offsetof(D2dmoeLayer, up)}, {"up_bias", offsetof(D2dmoeLayer, up_bias)},
        {"gate_weight", offsetof(D2dmoeLayer, gate_weight)}, {"gate_bias", offsetof(D2dmoeLayer, gate_bias)},
        {"down", offsetof(D2dmoeLayer, down)}, {"constants", offsetof(D2dmoeLayer, constants)},
        {"base", offsetof(D2dmoeLayer, base)}, {"linear_in", offsetof(D2dmoeLayer, linear_in)},
        {"linear_out", offsetof(D2dmoeLayer, linear_out)}, {"up_scale", offsetof(D2dmoeLayer, up_scale)},
        {"gate_scale", offsetof(D2dmoeLayer, gate_scale)}, {"down_scale", offsetof(D2dmoeLayer, down_scale)},
        {"router_scale", offsetof(D2dmoeLayer, router_scale)},
        {"linear_in_scale", offsetof(D2dmoeLayer, linear_in_scale)},
        {"linear_out_scale", offsetof(D2dmoeLayer, linear_out_scale)},
    };
    auto found = offsets.find(name);
    OPENVINO_ASSERT(found != offsets.end(), "DynamicFFN has no tensor ", name);
    return found->second;
}

template <typename T>
std::vector<T> list(const std::string& text) {
    std::istringstream stream(text);
    std::vector<T> found;
    for (T item; stream >> item;) found.push_back(item);
    return found;
}

// The attributes that are lists: tensors, offsets, strides, taus, tops.
using Texts = std::array<std::string, 5>;

// What they say.
struct Read {
    struct Place {
        size_t field;            // of the layer
        int64_t offset, stride;  // in the bytes
    };
    Texts texts;
    std::vector<Place> places;  // of the tensors
    std::vector<float> taus;    // of the budgets
    std::vector<int64_t> tops;
    int parts = 0;  // that a layer is computed in, for tests; 0: as many as threads

    explicit Read(const Texts& from) : texts(from), taus(list<float>(from[3])), tops(list<int64_t>(from[4])) {
        const auto names = list<std::string>(from[0]);
        const auto offsets = list<int64_t>(from[1]), strides = list<int64_t>(from[2]);
        OPENVINO_ASSERT(names.size() == offsets.size() && names.size() == strides.size(), "DynamicFFN lacks places");
        OPENVINO_ASSERT(!taus.empty() && taus.size() == tops.size(), "DynamicFFN has no budgets");
        if (const char* forced = std::getenv("D2DMOE_PARTS")) parts = std::atoi(forced);
        for (size_t i = 0; i < names.size(); i++) places.push_back({offset_of(names[i]), offsets[i], strides[i]});
    }
};

// The best instruction set of this processor for fp32 and int8; `D2DMOE_ISA` names another.
int best_kernels() {
    const char* named = std::getenv("D2DMOE_ISA");
    int best = 0;
    for (int number = 0; number < d2dmoe_kernels(); number++) {
        if (!d2dmoe_kernels_supported(number) || d2dmoe_kernels_bf16(number)) continue;
        best = number;
        if (named && std::strcmp(named, d2dmoe_kernels_name(number)) == 0) break;
    }
    return best;
}

#if D2DMOE_TBB
// As many as OpenVINO computes this inference with, and its own ones.
int threads() { return tbb::this_task_arena::max_concurrency(); }

void in_parts(int parts, void (*part)(void*, int, int), void* context) {
    if (parts == 1) return part(context, 0, 1);
    // Isolated: a thread that waits here must not begin another layer, whose memory is the thread's as well.
    tbb::this_task_arena::isolate([&] {
        tbb::parallel_for(0, parts, [&](int number) { part(context, number, parts); }, tbb::simple_partitioner{});
    });
}
#else
int threads() { return 1; }
constexpr D2dmoeParts in_parts = nullptr;
#endif

class DynamicFFN : public ov::op::Op {
   public:
    OPENVINO_OP("DynamicFFN", "extension");

    DynamicFFN() = default;
    explicit DynamicFFN(const ov::OutputVector& inputs) : Op(inputs) {}

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<DynamicFFN>(inputs);
        clone->layer_ = layer_, clone->texts_ = texts_, clone->read_ = read_;
        clone->validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("tensors", texts_[0]);
        visitor.on_attribute("offsets", texts_[1]);
        visitor.on_attribute("strides", texts_[2]);
        visitor.on_attribute("taus", texts_[3]);
        visitor.on_attribute("tops", texts_[4]);
        visitor.on_attribute("activation", layer_.activation);
        visitor.on_attribute("gate", layer_.gate);
        visitor.on_attribute("rounds", layer_.rounds);
        visitor.on_attribute("few", layer_.few);
        visitor.on_attribute("d", layer_.d);
        visitor.on_attribute("size", layer_.size);
        visitor.on_attribute("d_out", layer_.d_out);
        visitor.on_attribute("experts", layer_.experts);
        visitor.on_attribute("router_width", layer_.router_width);
        visitor.on_attribute("linear_rank", layer_.linear_rank);
        visitor.on_attribute("min_experts", layer_.min_experts);
        visitor.on_attribute("max_experts", layer_.max_experts);
        visitor.on_attribute("shared", layer_.shared);
        return true;
    }

    void validate_and_infer_types() override {
        if (texts_[0].empty()) return;  // the attributes follow
        NODE_VALIDATION_CHECK(this, get_input_size() == 3, "takes tokens, a budget and its tensors");
        if (!read_ || read_->texts != texts_) read_ = std::make_shared<const Read>(texts_);  // clones share it
        const bool whole = !layer_.rounds || !layer_.router_width || texts_[0].find("router_scale") != std::string::npos;
        NODE_VALIDATION_CHECK(this, whole, "was exported by an earlier d2dmoe, its router not in int8: export it again");
        NODE_VALIDATION_CHECK(this, get_input_element_type(0).compatible(ov::element::f32), "takes tokens in fp32");
        NODE_VALIDATION_CHECK(this, get_input_element_type(1).compatible(ov::element::i32), "takes a budget in i32");
        auto shape = get_input_partial_shape(0);
        if (shape.rank().is_static()) {
            auto& last = shape[shape.size() - 1];
            NODE_VALIDATION_CHECK(this, last.compatible(layer_.d), "takes tokens of ", layer_.d, " values");
            last = layer_.d_out;
        }
        set_output_type(0, ov::element::f32, shape);
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        auto shape = inputs[0].get_shape();
        shape.back() = size_t(layer_.d_out);
        outputs[0].set_shape(shape);
        const int64_t budget = inputs[1].data<const int32_t>()[0], budgets = int64_t(read_->taus.size());
        if (budget < 0 || budget >= budgets)
            fail(outputs[0], "this model holds " + std::to_string(budgets) + " budgets, counted from 0");
        static const int kernels = best_kernels();
        D2dmoeLayer layer = layer_;
        layer.kernels = kernels, layer.tau = read_->taus[budget], layer.top = read_->tops[budget];
        const char* bytes = aligned(inputs[2]);
        for (const auto& place : read_->places) {
            const char* data = bytes + place.offset + place.stride * budget;
            std::memcpy(reinterpret_cast<char*>(&layer) + place.field, &data, sizeof data);
        }
        const int64_t tokens = int64_t(inputs[0].get_size()) / layer.d;
        if (d2dmoe_forward_by(&layer, inputs[0].data(), layer.d, nullptr, tokens, outputs[0].data(),
                              read_->parts ? read_->parts : threads(), in_parts))
            fail(outputs[0], "no memory for " + std::to_string(tokens) + " tokens");
        return true;
    }

   private:
    // The tensors, at the start of a cache line. Files do not keep them so: then they are copied, once.
    const char* aligned(const ov::Tensor& tensor) const {
        const auto* bytes = static_cast<const char*>(tensor.data());
        if (reinterpret_cast<uintptr_t>(bytes) % LINE == 0) return bytes;
        std::lock_guard<std::mutex> lock(mutex_);
        auto& copy = copies_[bytes];
        if (copy.empty()) {
            copy.resize(tensor.get_byte_size() + LINE);
            std::memcpy(start(copy), bytes, tensor.get_byte_size());
        }
        return start(copy);
    }

    static char* start(std::vector<char>& copy) {
        return copy.data() + (LINE - reinterpret_cast<uintptr_t>(copy.data()) % LINE) % LINE;
    }

    // With sizes left open and one thread OpenVINO keeps errors to itself: what is read then must not look like an output.
    static void fail(ov::Tensor& output, const std::string& why) {
        std::fill_n(output.data<float>(), output.get_size(), std::numeric_limits<float>::quiet_NaN());
        OPENVINO_THROW("DynamicFFN: ", why);
    }

    D2dmoeLayer layer_{};
    Texts texts_;
    std::shared_ptr<const Read> read_;
    mutable std::mutex mutex_;
    mutable std::map<const char*, std::vector<char>> copies_;  // of inputs that never change
};

}  // namespace d2dmoe

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<d2dmoe::DynamicFFN>>()}));
