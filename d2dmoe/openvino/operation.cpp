// `DynamicFFN`: one converted feed-forward layer as an OpenVINO operation, computed by the native library.
//
// Inputs: tokens (…, d) in fp32, the number of a budget (scalar, i32), then the layer's tensors, whose names the
// attribute `tensors` holds in their order. Those named in `varying` have a leading dimension of the budgets. Lists are
// texts with spaces, which operations in Python can have as well. python_operation.py does the same.

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "openvino/core/extension.hpp"
#include "openvino/core/op_extension.hpp"
#include "openvino/op/op.hpp"

#include "layer.h"

namespace d2dmoe {

// Bytes that the library may read beyond weights in int8, see quads.py.
constexpr size_t SLACK = 64;

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

class DynamicFFN : public ov::op::Op {
   public:
    OPENVINO_OP("DynamicFFN", "extension");

    DynamicFFN() = default;
    explicit DynamicFFN(const ov::OutputVector& inputs) : Op(inputs) {}

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<DynamicFFN>(inputs);
        clone->layer_ = layer_, clone->tensors_ = tensors_, clone->varying_ = varying_;
        clone->taus_ = taus_, clone->tops_ = tops_;
        clone->validate_and_infer_types();
        return clone;
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("tensors", tensors_);
        visitor.on_attribute("varying", varying_);
        visitor.on_attribute("taus", taus_);
        visitor.on_attribute("tops", tops_);
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
        if (tensors_.empty()) return;  // the attributes follow
        budget_taus_ = list<float>(taus_), budget_tops_ = list<int64_t>(tops_);
        const auto varying = list<std::string>(varying_);
        places_.clear();
        for (const auto& name : list<std::string>(tensors_)) {
            const bool varies = std::find(varying.begin(), varying.end(), name) != varying.end();
            places_.push_back({offset_of(name), varies});
        }
        NODE_VALIDATION_CHECK(this, get_input_size() == places_.size() + 2, "expects ", places_.size() + 2, " inputs");
        NODE_VALIDATION_CHECK(this, !budget_taus_.empty() && budget_taus_.size() == budget_tops_.size(),
                              "has no budgets");
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
        auto* y = outputs[0].data<float>();
        // With sizes left open OpenVINO keeps errors to itself: what then is read must not look like an output.
        std::fill_n(y, outputs[0].get_size(), std::numeric_limits<float>::quiet_NaN());
        const int64_t budget = inputs[1].data<const int32_t>()[0], budgets = int64_t(budget_taus_.size());
        OPENVINO_ASSERT(budget >= 0 && budget < budgets, "budget ", budget, ": this model holds ", budgets,
                        " budgets, counted from 0");
        static const int kernels = best_kernels();
        D2dmoeLayer layer = layer_;
        layer.kernels = kernels, layer.tau = budget_taus_[budget], layer.top = budget_tops_[budget];
        for (size_t i = 0; i < places_.size(); i++) {
            const auto& tensor = inputs[i + 2];
            const size_t bytes = tensor.get_byte_size() - (tensor.get_element_type() == ov::element::u8 ? SLACK : 0);
            const auto* data = static_cast<const char*>(tensor.data()) + (places_[i].varies ? bytes / budgets * budget : 0);
            std::memcpy(reinterpret_cast<char*>(&layer) + places_[i].offset, &data, sizeof data);
        }
        const int64_t tokens = int64_t(inputs[0].get_size()) / layer.d;
        const int failed = d2dmoe_forward(&layer, inputs[0].data(), layer.d, nullptr, tokens, y, 1);
        OPENVINO_ASSERT(!failed, "no memory for ", tokens, " tokens");
        return true;
    }

   private:
    D2dmoeLayer layer_{};
    std::string tensors_, varying_, taus_, tops_;
    std::vector<float> budget_taus_;
    std::vector<int64_t> budget_tops_;
    struct Place {
        size_t offset;  // in the layer
        bool varies;    // by budget
    };
    std::vector<Place> places_;  // of the tensors
};

}  // namespace d2dmoe

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<d2dmoe::DynamicFFN>>()}));
