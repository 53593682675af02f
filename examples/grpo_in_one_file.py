"""GRPO in one file: read it from top to bottom, then run it. It needs torch and transformers and nothing else.

    python examples/grpo_in_one_file.py            about half a minute on one CPU core
    python examples/grpo_in_one_file.py --steps 20 --beta 0.01

A small transformer with random weights sees two digits, `73=`, and should write them smallest first and stop: `37` and the
end token. Nobody shows it an answer. It writes 16 completions for every prompt, a function scores them, and what scored above
the average of its own 16 becomes more likely. That average is the whole trick: PPO trains a second network to know what
score to expect; GRPO asks the siblings.
"""

import argparse
import copy
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

PAD, EOS, EQUALS = 10, 11, 12  # the digits are their own token ids
PROMPTS, GROUP, MAX_NEW = 16, 16, 4  # prompts per step, completions per prompt, longest completion
TEMPERATURE = 1.0
EPOCHS, CLIP = 2, 0.2  # updates per batch of samples, and how far they may move a token's probability


def tiny_model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=13, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=16, tie_word_embeddings=True, pad_token_id=PAD,
        eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()  # eval: dropout would make two readings of one text differ


def some_prompts(n: int, g: torch.Generator) -> torch.Tensor:
    # All prompts have 3 tokens. Prompts of several lengths would need left padding, its mask and position ids.
    return torch.cat([torch.randint(10, (n, 2), generator=g), torch.full((n, 1), EQUALS)], 1)


def score(prompt: list[int], completion: list[int]) -> float:
    """One third for each token in its place: the smaller digit, the larger one, the end."""
    right = [*sorted(prompt[:2]), EOS]
    return sum(a == b for a, b in zip(completion, right)) / len(right)


@torch.no_grad()
def sample(model, prompts: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions [B, T] and their mask [B, T]: True up to AND INCLUDING the end token."""
    ids, alive, mask = prompts, torch.ones(len(prompts), dtype=torch.bool), []
    for _ in range(MAX_NEW):
        logits = model(ids).logits[:, -1] / TEMPERATURE
        token = torch.multinomial(logits.softmax(-1), 1, generator=g)[:, 0]
        mask.append(alive)  # the end token was a decision too: leave it out and the model never learns to stop
        ids = torch.cat([ids, torch.where(alive, token, PAD)[:, None]], 1)
        alive = alive & (token != EOS)
    return ids[:, prompts.shape[1] :], torch.stack(mask, 1)


def log_probs(model, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    """log pi(token) [B, T] of each completion token, under the distribution that was SAMPLED from.

    Hence the same temperature as in `sample`. Without it this is another policy: the ratio below would not be 1 before the
    first update, and clipping would act on a difference that no training has made.
    """
    logits = model(torch.cat([prompts, completions], 1)).logits
    logits = logits[:, prompts.shape[1] - 1 : -1] / TEMPERATURE  # position t predicts token t + 1
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (std + eps) inside each group [prompts, GROUP].

    A group whose rewards are all equal has mean r and std 0, so every advantage is 0 and the group teaches nothing. That is
    right: nothing in it is better than anything else. eps keeps 0 / 0 out, and tames groups that hardly differ.
    """
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)


def grpo_loss(logp, old, ref, A, mask, beta: float) -> torch.Tensor:
    ratio = (logp - old).exp()  # 1 at the first update; its gradient there is that of logp, so the first step is REINFORCE
    # The minimum makes the objective pessimistic: once the ratio has moved more than CLIP in the direction that the advantage
    # asks for, there is nothing more to gain and the gradient is 0. A move in the wrong direction is always corrected.
    gain = torch.minimum(ratio * A, ratio.clamp(1 - CLIP, 1 + CLIP) * A)
    if ref is not None:
        d = ref - logp
        gain = gain - beta * (d.exp() - d - 1)  # "k3": an estimate of KL(pi || ref) that is never negative
    # The mean over each path's own tokens, then over paths: GRPO's 1/|o|. Padding is out of both sums. (Dividing by a
    # constant instead is Dr.GRPO; one mean over all tokens of the batch is DAPO's.)
    return -((gain * mask).sum(1) / mask.sum(1)).mean()


def train(steps: int = 80, beta: float = 0.0, lr: float = 3e-3, seed: int = 0, show: int = 10) -> list[float]:
    """The mean reward of every step."""
    torch.manual_seed(seed)  # the model's random weights; everything else draws from g
    g = torch.Generator().manual_seed(seed)
    model = tiny_model()
    reference = copy.deepcopy(model) if beta else None  # where the KL pulls back to
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    history, start = [], time.time()
    for step in range(1, steps + 1):
        # 1. Sample a group for each prompt, from the policy as it is now.
        prompts = some_prompts(PROMPTS, g).repeat_interleave(GROUP, 0)  # rows of a group stand together
        completions, mask = sample(model, prompts, g)

        # 2. Score each completion, and compare it with its siblings. Every token of a path gets the path's advantage.
        written = [c[m].tolist() for c, m in zip(completions, mask)]
        rewards = torch.tensor([score(p, c) for p, c in zip(prompts.tolist(), written)]).view(PROMPTS, GROUP)
        A = advantages(rewards).view(-1, 1)

        # 3. Remember what the sampling policy said: `old` stays fixed while the policy moves away from it.
        with torch.no_grad():
            old = log_probs(model, prompts, completions)
            ref = None if reference is None else log_probs(reference, prompts, completions)

        # 4. A few updates on the same samples. Clipping keeps the later ones honest.
        for _ in range(EPOCHS):
            loss = grpo_loss(log_probs(model, prompts, completions), old, ref, A, mask, beta)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        history.append(rewards.mean().item())
        if step == 1 or step % show == 0:
            # Do not watch the loss: advantages sum to 0 in every group, so it hovers around 0 however well training goes.
            live = (rewards.std(1) > 0).float().mean().item()
            digits = "".join("0123456789_.="[t] for t in [*prompts[0].tolist(), *written[0]])
            took = time.time() - start
            print(f"step {step:3d}  reward {history[-1]:.2f}  groups that teach {live:4.0%}  {digits:8s} {took:3.0f} s")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL to the initial model")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    train(asked.steps, asked.beta, seed=asked.seed)
