"""Mistakes in the science, each of which the tests must see: `python -m tests.mutations [WORD]`.

Each is made in a copy of the project, one after the other, and the tests named beside it are run there: they must fail.
WORD runs those whose description has it. A few minutes on one core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """A text that stands once in a file of src/atelier, what takes its place, and the tests that see it."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str


MUTATIONS = [
    Mutation(
        "noise is taken away, not added",
        "diffusion/objective.py",
        "alpha * x + sigma * eps",
        "alpha * x - sigma * eps",
        "tests/diffusion/test_objective.py",
    ),
    Mutation(
        "velocity has the other sign",
        "diffusion/targets.py",
        "return -sigma, alpha",
        "return sigma, alpha",
        "tests/diffusion/test_targets.py",
    ),
    Mutation(
        "min-SNR is max-SNR",
        "diffusion/weightings.py",
        "snr.clamp(max=",
        "snr.clamp(min=",
        "tests/diffusion",
    ),
    Mutation(
        "the posterior forgets how much of x_t is kept",
        "diffusion/posterior.py",
        "return factor * kept * x_t + s.alpha",
        "return factor * x_t + s.alpha",
        "tests/diffusion/test_samplers.py",
    ),
    Mutation(
        "Heun adds its slopes where it should average them",
        "diffusion/samplers.py",
        "(d + d_s) / 2",
        "(d + d_s)",
        "tests/diffusion/test_samplers.py",
    ),
    Mutation(
        "guidance starts from the conditional answer",
        "diffusion/guidance.py",
        "free[:, :n] + self.guidance * (known - free)[:, :n]",
        "known[:, :n] + self.guidance * (known - free)[:, :n]",
        "tests/diffusion/test_guidance.py",
    ),
    Mutation(
        "guidance is rescaled by what is not scaled to unit length",
        "diffusion/guidance.py",
        "length = (level[0] ** 2 + level[1] ** 2).sqrt()",
        "length = torch.ones_like(level[0])",
        "tests/diffusion/test_guidance_interval.py",
    ),
    Mutation(
        "a classifier sees x_t as long as the sampler's schedule has it",
        "diffusion/guidance.py",
        "x = (scale * x_t).detach()",
        "x = x_t.detach()",
        "tests/diffusion/test_guidance_classifier.py",
    ),
    Mutation(
        "an average moves by what it should keep",
        "callbacks/ema.py",
        "gain = 1 - 0.5 **",
        "gain = 0.5 **",
        "tests/callbacks/test_ema.py",
    ),
    Mutation(
        "R1 is a mean over pixels",
        "losses/regularizers.py",
        "gradient.float().square().flatten(1).sum(1).mean()",
        "gradient.float().square().flatten(1).mean(1).mean()",
        "tests/models/test_gan.py tests/losses",
    ),
    Mutation(
        "WGAN-GP holds the gradient to 0",
        "losses/regularizers.py",
        "norm(dim=1) - 1)",
        "norm(dim=1) - 0)",
        "tests/models/test_gan.py tests/losses",
    ),
    Mutation(
        "StyleGAN2's discriminator sees real images without augmentation",
        "models/stylegan2.py",
        'real, fake = self.seen(batch["image"]), self.seen(',
        'real, fake = batch["image"], self.seen(',
        "tests/models/test_two_players.py",
    ),
    Mutation(
        "the hinge of real images points the other way",
        "losses/adversarial.py",
        "F.relu(1 - real.float())",
        "F.relu(1 + real.float())",
        "tests/losses/test_adversarial.py",
    ),
    Mutation(
        "the relativistic generator plays for the discriminator",
        "losses/adversarial.py",
        "return F.softplus(real.float() - fake.float()).mean()",
        "return F.softplus(fake.float() - real.float()).mean()",
        "tests/losses/test_adversarial.py",
    ),
    Mutation(
        "the KL forgets the log variance",
        "losses/kl.py",
        "logvar.exp() - 1 - logvar",
        "logvar.exp() - 1",
        "tests/losses tests/models/test_vae.py",
    ),
    Mutation(
        "the importance-sampled bound adds log K",
        "models/vae.py",
        "math.log(self.nll_samples) - torch.stack(terms).logsumexp(0)",
        "-math.log(self.nll_samples) - torch.stack(terms).logsumexp(0)",
        "tests/models/test_vae.py",
    ),
    Mutation(
        "no gradient goes through the codes",
        "nets/quantizers.py",
        "return e.detach() + (z - z.detach())",
        "return e.detach()",
        "tests/nets/test_quantizers.py",
    ),
    Mutation(
        "a coupling's Jacobian has the other sign",
        "nets/invertible.py",
        "logdet = logdet + change",
        "logdet = logdet - change",
        "tests/nets",
    ),
    Mutation(
        "patches are told apart sixteen times as sharply",
        "losses/contrastive.py",
        "key.float().transpose(1, 2) / temperature",
        "key.float().transpose(1, 2) / temperature**2",
        "tests/losses tests/models/test_cut.py",
    ),
    Mutation(
        "the way back is asked of the wrong translator",
        "models/cyclegan.py",
        "cycle = _far(self.generator_b2a(fake_b), a)",
        "cycle = _far(self.generator_a2b(fake_b), a)",
        "tests/models/test_cyclegan.py",
    ),
    Mutation(
        "reduction does not smooth",
        "images/bicubic.py",
        "wide = max(1.0, 1 / scale)",
        "wide = 1.0",
        "tests/images/test_bicubic.py",
    ),
    Mutation(
        "a cosine decay ends at nothing",
        "optim.py",
        "(0.01 + 0.99 *",
        "(0.00 + 1.00 *",
        "tests/test_optim.py",
    ),
    Mutation(
        "a pixel's level is twice as wide",
        "losses/likelihood.py",
        "x[0].numel() * math.log(LEVEL)",
        "x[0].numel() * math.log(LEVEL / 2)",
        "tests/losses/test_likelihood.py",
    ),
    Mutation(
        "adapters are unmerged by subtraction",
        "nets/lora.py",
        "layer.weight.copy_(layer.lora.kept)",
        "layer.weight.sub_(sum(blocks.change(weight) for blocks, weight in layer.lora.active()))",
        "tests/nets/test_lora.py",
    ),
    Mutation(
        "a file of adapters says the rank for alpha",
        "checkpoints/lora_files.py",
        "torch.tensor(float(block.alpha))",
        "torch.tensor(float(block.rank))",
        "tests/checkpoints/test_diffusers_lora.py",
    ),
]


def survives(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests pass in spite of it."""
    path = copy / "src" / "atelier" / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.right, mutation.wrong))
    environment = os.environ | {"PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy}"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split()]
    try:
        code = subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode
    finally:
        path.write_text(text)
    if code not in (0, 1):
        raise RuntimeError(f"{mutation.what}: pytest ended with {code}")
    return code == 0


def main(word: str = "") -> int:
    chosen = [mutation for mutation in MUTATIONS if word in mutation.what]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "atelier"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "outputs", ".venv*", "__pycache__"))
        alive = []
        for k, mutation in enumerate(chosen, 1):
            lives = survives(mutation, copy)
            alive += [mutation] * lives
            print(f"{k} of {len(chosen)}  {'SURVIVES' if lives else 'killed  '}  {mutation.what}", flush=True)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed")
    return min(1, len(alive))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
