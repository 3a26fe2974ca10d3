"""Training steps by PyTorch as the published trainers take them, for the measurements of .ci/reference-step and reference-run."""
import torch

RHO = 2.0  # of Vaccine


class Trainer:
    """Steps of AdamW on what is trainable, over batches of (ids, labels, mask). Vaccine's take two passes, with the hooks of its
    trainer on attention."""

    def __init__(self, model, vaccine=False, autocast=None):
        self.model, self.vaccine, self.autocast = model.train(), vaccine, autocast
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0.1)
        self.attention = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
        assert len(self.attention) == model.config.num_hidden_layers

    def a_pass(self, batch):
        ids, labels, mask = batch
        with torch.autocast(self.autocast or "cpu", dtype=torch.bfloat16, enabled=self.autocast is not None):
            loss = self.model(input_ids=ids, labels=labels, attention_mask=mask, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def two_passes(self, batch):
        found = {}
        hooks = [module.register_backward_hook(lambda module, _, out: found.update({module: out[0].detach().clone()}))
                 for module in self.attention]
        self.a_pass(batch)
        for hook in hooks:
            hook.remove()
        assert len(found) == len(self.attention)
        norm = torch.norm(torch.stack([gradient.norm() for gradient in found.values()]))
        shifts = {module: gradient * (RHO / (norm + 1e-7)) for module, gradient in found.items()}
        self.optimizer.zero_grad()

        def shift(module, _, output):
            output[0].data = output[0] + shifts[module]
            return output
        hooks = [module.register_forward_hook(shift) for module in self.attention]
        loss = self.a_pass(batch)
        for hook in hooks:
            hook.remove()
        return loss

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = self.two_passes(batch) if self.vaccine else self.a_pass(batch)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return float(loss)
