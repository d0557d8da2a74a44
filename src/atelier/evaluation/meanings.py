"""What the figures of an evaluation mean, a plain sentence each: for whoever sees them for the first time."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

WIDTH = 19  # columns for a name
MEANINGS = {  # as a figure is shown here: the pattern of its name, "" where that is the same; what it is
    "judge/valid": ("", "share of samples that are whole scenes of this world"),
    "judge/loose": ("", "the same with wider limits: nearly whole ones count too"),
    "judge/coverage": ("", "share of the 36 pairs of shape and colour among the valid"),
    "judge/duplicates": ("", "share of samples that are all but equal to another one"),
    "judge/combinations": ("", "different scenes seen; 1 = as many as among true ones"),
    "judge/places": ("", "different places of them; 1 = as many as among true ones"),
    "judge/recall": ("", "share of true scenes that have a sample like them"),
    "judge/asked": ("", "share of samples, valid or not, with all that was asked"),
    "judge/label, ...": (
        "judge/(label|shape|colour|size|fill|ground)", "share of the valid whose label (shape and colour) is right"
    ),
    "refused: border": ("", "the edge is not all plain ground"),
    "refused: iou": ("", "the outline fits none of the shapes well enough"),
    "refused: rms": ("", "the scene, drawn anew as the judge sees it, looks another"),
    "answer/all": ("", "share of results that are what they should have become"),
    "answer/shape, ...": ("answer/(shape|colour|size|fill|ground|place)", "share that have the shape they should have"),
    "answer/changed": ("", "share in which all that had to change is right"),
    "answer/kept": ("", "share in which all that had to stay has stayed"),
    "fid": ("(recon/)?fid", "distance to real images in features: lower is better"),
    "fd_...": ("(recon/)?fd_.*", "as FID, by another net: lower is better, never beside FID"),
    "kid": ("(recon/)?kid.*", "such a distance, also of few images: lower is better"),
    "is": ("(recon/)?is(_.*)?", "inception score, clear and varied: higher is better"),
    "precision": ("(recon/)?precision.*", "share of samples that look like real images"),
    "recall": ("(recon/)?recall.*", "share of real images that have a sample like them"),
    "label/accuracy": ("label/accuracy(_real)?", "share whose label a classifier sees; _real: of test images"),
    "clip_score": ("", "how well images fit their texts: higher is better"),
    "memorisation": ("", "0.5: as far from training images as new ones; 1: all nearer"),
    "heldout/...": ("heldout/.*", "error on test images by log-SNR; 1 = as of a pixel alone"),
    "training/...": ("training/.*", "the same on training images"),
    "gap": ("", "ln of heldout/loss over training/loss: above 0, overfits"),
    "condition_gain": ("", "what the true condition takes off the error; 0: ignored"),
    "recon/valid": ("", "share of test images that come back as whole scenes"),
    "psnr": (r"\w+/(bicubic_)?psnr(_y)?", "nearness in decibels: higher is nearer; _y: brightness"),
    "ssim": (r"\w+/(bicubic_)?ssim(_y)?", "likeness of structure: 1 = equal; _y: brightness"),
    "lpips": (r"\w+/lpips", "distance as a trained net sees it: 0 = equal"),
    "pair/bicubic_...": (r"pair/bicubic_\w+", "what plain enlarging reaches"),
    "codes/used": ("", "share of the codebook that test images make use of"),
    "codes/perplexity": ("", "how many codes that is, the seldom ones counted less"),
    "bpd": ("", "bits to write down a number of an image: lower is better"),
    "bpd_...": ("bpd_.*", "its standard error; of which start, steps and last step"),
    "nll": ("", "-ln of an image's, or label's, probability: lower is better"),
    "accuracy": ("", "share of noisy test images whose label is found"),
    "accuracy/NOISE": (r"accuracy/[\d.]+", "the same at so much noise, the image having 1"),
    "accuracy/K_of_N": (r"accuracy/\d+_of_\d+", "share whose own text is among the K likeliest of N"),
}  # fmt: skip


def meanings(names: Iterable[str], width: int) -> list[str]:
    """A line or more for each of the figures, whatever case of a model they are of, no wider than `width`."""
    names, lines = [re.sub(r"^(\w+2\w+/)?(real|raw)/", r"\1", name) for name in names], []
    for label, (pattern, meaning) in MEANINGS.items():
        if any(re.fullmatch(rf"(\w+2\w+/)?({pattern or re.escape(label)})", name) for name in names):
            first = f"  {label:<{WIDTH}}"
            lines += textwrap.wrap(meaning, width, initial_indent=first, subsequent_indent=" " * len(first))
    return lines
