//! What differs between the architectures that run: a row of [`TABLE`] for each, read by both containers.
//!
//! The model itself is one (`model/block.rs`): RMS norms, rotary positions, grouped-query attention, SwiGLU. An architecture may
//! add biases to its projections, normalise each head of the queries and keys, and limit attention to a sliding window.

use super::MAX_LAYERS;
use std::num::NonZeroUsize;

/// A family of models, as its configuration names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Family {
    /// LLaMA 1 to 3, SmolLM2, TinyLlama and others.
    #[default]
    Llama,
    /// Mistral 7B and its kin: a sliding window, or none.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3, the dense models: a norm on each head of q and k.
    Qwen3,
}

/// What a model has beyond plain LLaMA.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Architecture {
    /// The family.
    pub family: Family,
    /// The projections that add a bias.
    pub biases: Biases,
    /// Whether each head of q and k is normalised before it is rotated.
    pub head_norms: bool,
    /// How far back attention looks.
    pub window: Option<Window>,
}

/// The projections that add a bias, by group: files have all of a group or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// q, k and v.
    pub qkv: bool,
    /// o.
    pub o: bool,
    /// gate, up and down.
    pub mlp: bool,
}

/// Sliding-window attention (Mistral 7B, arXiv 2310.06825).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The keys that a query sees: its own and those just before it.
    pub size: NonZeroUsize,
    /// Whether each layer has the window, at least one of them; the others attend to everything.
    pub layers: Vec<bool>,
}

impl Window {
    /// A window in the layers that `slides` names, if there are any. More layers than a model may have are left to
    /// [`Config::check`](super::Config::check).
    pub(crate) fn new(size: NonZeroUsize, layers: usize, slides: impl FnMut(usize) -> bool) -> Option<Self> {
        let layers: Vec<bool> = (0..layers.min(MAX_LAYERS)).map(slides).collect();
        layers.contains(&true).then_some(Self { size, layers })
    }

    /// Whether all layers have it.
    pub fn everywhere(&self) -> bool {
        !self.layers.contains(&false)
    }

    /// The first layer with the window, if all behind it have it too.
    pub fn from_layer(&self) -> Option<usize> {
        let first = self.layers.iter().position(|&slides| slides)?;
        (!self.layers[first..].contains(&false)).then_some(first)
    }
}

impl Architecture {
    /// The window of a layer, if it has one.
    pub fn window(&self, layer: usize) -> Option<NonZeroUsize> {
        let window = self.window.as_ref()?;
        window.layers.get(layer).is_some_and(|&slides| slides).then_some(window.size)
    }
}

/// When config.json's `sliding_window` applies. Where it does, `layer_types` may say which layers have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowRule {
    /// Never: transformers doesn't look at the key.
    Never,
    /// Unless it is null.
    Always,
    /// If `use_sliding_window` says so, from layer `max_window_layers` on.
    Optional,
}

/// A row of the table.
pub(crate) struct Traits {
    pub family: Family,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// The class in transformers.
    pub class: &'static str,
    /// `general.architecture` in GGUF, which knows Mistral as "llama".
    pub gguf: Option<&'static str>,
    /// The biases that every model of the family has.
    pub biases: Biases,
    /// Whether config.json's `attention_bias` adds biases to q, k, v and o.
    pub attention_bias: bool,
    /// Whether config.json's `mlp_bias` adds biases to gate, up and down.
    pub mlp_bias: bool,
    pub head_norms: bool,
    pub window: WindowRule,
    /// The head size where config.json has no `head_dim`; `None`: hidden size / heads.
    pub head_dim: Option<usize>,
    /// The key-value heads where config.json has no `num_key_value_heads`; `None`: as many as there are heads.
    pub kv_heads: Option<usize>,
    /// The token that begins a text where config.json has no `bos_token_id`.
    pub bos: Option<u32>,
    /// The token that ends a text where config.json has no `eos_token_id`.
    pub eos: Option<u32>,
    /// Whether GGUF files store the rows of q and k in pairs, for a rotation of neighbours (`RowOrder::Interleaved`).
    pub interleaved: bool,
}

const NO_BIASES: Biases = Biases { qkv: false, o: false, mlp: false };

const LLAMA: Traits = Traits {
    family: Family::Llama,
    model_type: "llama",
    class: "LlamaForCausalLM",
    gguf: Some("llama"),
    biases: NO_BIASES,
    attention_bias: true,
    mlp_bias: true,
    head_norms: false,
    window: WindowRule::Never,
    head_dim: None,
    kv_heads: None,
    bos: Some(1),
    eos: Some(2),
    interleaved: true,
};

pub(crate) const TABLE: [Traits; 4] = [
    LLAMA,
    Traits {
        family: Family::Mistral,
        model_type: "mistral",
        class: "MistralForCausalLM",
        gguf: None,
        attention_bias: false,
        mlp_bias: false,
        window: WindowRule::Always,
        // The defaults of their configuration classes, here and below.
        kv_heads: Some(8),
        ..LLAMA
    },
    Traits {
        family: Family::Qwen2,
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        gguf: Some("qwen2"),
        biases: Biases { qkv: true, ..NO_BIASES },
        attention_bias: false,
        mlp_bias: false,
        window: WindowRule::Optional,
        kv_heads: Some(32),
        bos: None,
        eos: None,
        interleaved: false,
        ..LLAMA
    },
    Traits {
        family: Family::Qwen3,
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        gguf: Some("qwen3"),
        mlp_bias: false,
        head_norms: true,
        window: WindowRule::Optional,
        head_dim: Some(128),
        kv_heads: Some(32),
        bos: None,
        eos: None,
        interleaved: false,
        ..LLAMA
    },
];

impl Traits {
    /// The row of a `model_type`. transformers calls a Mistral whose layers differ Ministral.
    pub fn of_model_type(name: &str) -> Option<&'static Self> {
        let name = if name == "ministral" { "mistral" } else { name };
        TABLE.iter().find(|traits| traits.model_type == name)
    }

    /// The row of a `general.architecture`.
    pub fn of_gguf(name: &str) -> Option<&'static Self> {
        TABLE.iter().find(|traits| traits.gguf == Some(name))
    }
}

impl Family {
    /// Its name in config.json: "qwen2".
    pub fn name(self) -> &'static str {
        self.traits().model_type
    }

    pub(crate) fn traits(self) -> &'static Traits {
        let row = TABLE.iter().find(|traits| traits.family == self);
        row.expect("a row for each family")
    }
}

/// The names of all rows, for messages: "llama", "mistral" or "qwen2".
pub(crate) fn supported(name: impl Fn(&Traits) -> Option<&'static str>) -> String {
    let names: Vec<_> = TABLE.iter().filter_map(name).map(|name| format!("\"{name}\"")).collect();
    let (last, others) = names.split_last().expect("the table has rows");
    format!("{} or {last}", others.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_one_row_and_its_names_lead_to_it() {
        for family in [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3] {
            assert_eq!(TABLE.iter().filter(|traits| traits.family == family).count(), 1);
            assert_eq!(Traits::of_model_type(family.name()).unwrap().family, family);
            let by_gguf = family.traits().gguf.and_then(Traits::of_gguf);
            assert!(by_gguf.is_none_or(|traits| traits.family == family));
        }
        assert_eq!(supported(|traits| Some(traits.model_type)), r#""llama", "mistral", "qwen2" or "qwen3""#);
        assert_eq!(supported(|traits| traits.gguf), r#""llama", "qwen2" or "qwen3""#);
        assert!(Traits::of_model_type("gemma2").is_none() && Traits::of_gguf("mistral").is_none());
    }

    #[test]
    fn a_layer_has_the_window_or_none() {
        let size = NonZeroUsize::new(7).unwrap();
        let window = |layers: &[bool]| Window { size, layers: layers.to_vec() };
        let architecture =
            Architecture { window: Some(window(&[false, true, false, true])), ..Architecture::default() };
        assert_eq!([0, 1, 2, 3, 4].map(|l| architecture.window(l).map_or(0, NonZeroUsize::get)), [0, 7, 0, 7, 0]);
        assert_eq!(window(&[false, true, false, true]).from_layer(), None);
        assert_eq!(window(&[false, true, true]).from_layer(), Some(1));
        assert_eq!(Window::new(size, 3, |layer| layer > 5), None);
        assert!(Window::new(size, 3, |_| true).unwrap().everywhere());
    }
}
