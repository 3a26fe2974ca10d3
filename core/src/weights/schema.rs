//! What parameters a model has, and what each of them is.

/// How a parameter starts when a model is built from scratch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
}

/// The module of an untied output head, as Hugging Face's causal language models call it.
pub const HEAD: &str = "lm_head";

/// What a parameter is: it decides how it is stored and whether LoRA adapts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The table `[vocabulary, width]` of an embedding, which may serve as the head too.
    Embedding,
    /// The weight `[out, in]` of a linear layer.
    Linear,
    /// The weight `[vocabulary, width]` of an untied output head.
    Head,
    /// Anything else: a norm, a bias.
    Other,
}

/// One declared parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// The Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The shape, as in the checkpoint.
    pub shape: Vec<usize>,
    /// How it starts in a model built from scratch.
    pub init: Init,
    /// What it is.
    pub role: Role,
    /// The transformer block that it belongs to; `None` for embeddings, the last norm and the head.
    pub block: Option<usize>,
}

impl Param {
    /// Whether it is the weight `[out, in]` of a linear layer, the head included, which LoRA may adapt.
    pub fn is_linear(&self) -> bool {
        matches!(self.role, Role::Linear | Role::Head)
    }
}

/// The handle of a parameter within its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ParamId(pub(super) usize);

/// The parameters of a model in checkpoint order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ParamList {
    pub(super) params: Vec<Param>,
    /// The block whose parameters are being declared.
    block: Option<usize>,
}

impl ParamList {
    /// Declares the parameters of transformer block `index`: those that `declare` adds.
    pub fn block<T>(&mut self, index: usize, declare: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.block.replace(index);
        let declared = declare(self);
        self.block = outer;
        declared
    }

    /// Declares a parameter that LoRA does not adapt.
    pub fn tensor(&mut self, name: impl Into<String>, shape: &[usize], init: Init) -> ParamId {
        self.push(name.into(), shape, init, Role::Other)
    }

    /// Declares the table `[vocabulary, width]` of the embedding `module`.
    pub fn embedding(&mut self, module: &str, vocabulary: usize, width: usize, std: f64) -> ParamId {
        self.push(format!("{module}.weight"), &[vocabulary, width], Init::Normal(std), Role::Embedding)
    }

    /// Declares the weight `[vocabulary, width]` of an untied output head, called [`HEAD`].
    pub fn head(&mut self, vocabulary: usize, width: usize, std: f64) -> ParamId {
        self.push(format!("{HEAD}.weight"), &[vocabulary, width], Init::Normal(std), Role::Head)
    }

    /// Declares the weight `[output, input]` of the linear layer `module`.
    pub fn linear(&mut self, module: &str, output: usize, input: usize, std: f64) -> ParamId {
        self.push(format!("{module}.weight"), &[output, input], Init::Normal(std), Role::Linear)
    }

    /// The parameters in order.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.params.iter()
    }

    /// The last parts of the names of all linear layers, the head's included, each once, in checkpoint order: what LoRA
    /// may target.
    pub fn linear_names(&self) -> Vec<&str> {
        self.names_of(&[Role::Linear, Role::Head])
    }

    /// The last parts of the names of the linear layers with these roles.
    pub(super) fn names_of(&self, roles: &[Role]) -> Vec<&str> {
        let modules = self.iter().filter(|param| roles.contains(&param.role)).map(|param| module_of(&param.name));
        let mut names = Vec::new();
        for name in modules.filter_map(|module| module.rsplit('.').next()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// The parameter of this handle.
    pub fn get(&self, id: ParamId) -> &Param {
        &self.params[id.0]
    }

    /// How many numbers there are in all.
    pub fn count(&self) -> usize {
        let size = |param: &Param| param.shape.iter().fold(1usize, |product, &size| product.saturating_mul(size));
        self.params.iter().map(size).fold(0, usize::saturating_add)
    }

    fn push(&mut self, name: String, shape: &[usize], init: Init, role: Role) -> ParamId {
        self.params.push(Param { name, shape: shape.to_vec(), init, role, block: self.block });
        ParamId(self.params.len() - 1)
    }
}

/// The names of the factors `A` and `B` of the adapter of `module`.
pub fn factor_names(module: &str) -> [String; 2] {
    ["lora_A", "lora_B"].map(|factor| format!("{module}.{factor}.weight"))
}

/// `model.layers.0.self_attn.q_proj` of `model.layers.0.self_attn.q_proj.weight`.
pub fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}
