"""The models by their names in configs."""

from __future__ import annotations

from vaecf.models import mult_vae, rec_vae

MODELS: dict[str, type[mult_vae.MultDAE]] = {
    "mult_vae": mult_vae.MultVAE,
    "mult_dae": mult_vae.MultDAE,
    "rec_vae": rec_vae.RecVAE,
}
