// The smallest model that there is: an embedding that is its own head. It predicts a token from the one before it.
use serde_json::{Value, json};
use titer_core::data::Tokens;
use titer_core::nn::layers::Embedding;
use titer_core::weights::{ParamId, ParamList};
use titer_core::{Forward, Model, ModelSpec, Result, Traced};

#[derive(Debug)]
struct Bigram {
    spec: ModelSpec,
    params: ParamList,
    embedding: Embedding,
}

impl Bigram {
    fn new(vocab_size: usize, hidden_size: usize) -> Self {
        let mut params = ParamList::default();
        let embedding = Embedding::new(&mut params, "model.embed_tokens", vocab_size, hidden_size, 0.5);
        let spec = ModelSpec { vocab_size, hidden_size, layers: 0, kv_heads: 1, head_dim: 1, max_positions: 64 };
        Self { spec, params, embedding }
    }
}

impl Model for Bigram {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn params(&self) -> &ParamList {
        &self.params
    }

    fn config(&self) -> Value {
        json!({ "model_type": "bigram", "vocab_size": self.spec.vocab_size, "hidden_size": self.spec.hidden_size })
    }

    fn sites(&self) -> Vec<String> {
        vec!["embed".to_owned()]
    }

    fn embed(&self, tokens: &Tokens, pass: &mut Forward) -> Result<Traced> {
        let x = self.embedding.forward(&tokens.ids, pass)?;
        pass.sites.visit("embed", x, &mut pass.tape)
    }

    fn block(&self, _index: usize, x: &Traced, _pass: &mut Forward) -> Result<Traced> {
        Ok(x.clone())
    }

    fn final_norm(&self, x: &Traced, _pass: &mut Forward) -> Result<Traced> {
        Ok(x.clone())
    }

    fn logits(&self, hidden: &Traced, pass: &mut Forward) -> Result<Traced> {
        self.embedding.logits(hidden, pass)
    }

    fn head(&self) -> Option<ParamId> {
        Some(self.embedding.weight())
    }
}
