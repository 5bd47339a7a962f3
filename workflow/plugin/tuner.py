"""A tuner: one vector for each task, added to the embeddings of states; nothing else moves."""

from dataclasses import dataclass

import torch

from promptnb.tuners.core import TUNERS, Adapted, Tuner, frozen, windows_loss


@dataclass
class Nudge(Tuner):
    "Its hyper-parameters are fields; recipes name them."

    steps: int = 100
    lr: float = 1e-2
    log_every: int = 20
    IDLE = dict(steps=0)  # with which nothing is tuned

    def adapt(self, policy, demos, rng, score=None):
        "What every tuner has: the frozen policy, and the demonstrations of some tasks, in; policies with prompts out."
        mine = [policy.clone().prompted(demos.prompt[g : g + 1], demos.task_ids[g : g + 1]) for g in range(demos.G)]
        nudges = [frozen(p.model).embed.s.bias.requires_grad_(True) for p in mine]
        optimiser, log = torch.optim.Adam(nudges, self.lr), []

        def errors(key):
            windows = demos.batch(key)
            each = [windows_loss(p.model, p.prefix(), windows[g : g + 1]).sum() for g, p in enumerate(mine)]
            return torch.stack(each)

        for t in range(self.steps + 1):
            if t % self.log_every == 0 or t == self.steps:
                log += [dict(step=t, task=g, loss=e) for g, e in enumerate(errors("held").tolist())]
            if t < self.steps:
                optimiser.zero_grad()
                errors((rng, t)).sum().backward()
                optimiser.step()
        return Adapted([(p.requires_grad_(False), 0) for p in mine], nudges[0].numel(), log)


TUNERS["nudge"] = Nudge
