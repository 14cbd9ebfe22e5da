"""Parts of the recipes of the embedded editors: FLUX-Kontext pipelines small enough to train in minutes or hours.

Every part is of the class that the real pipeline uses (`FluxTransformer2DModel`, `AutoencoderKL`, `T5EncoderModel`,
`CLIPTextModel`, their tokenizers, the scheduler), so the result has the same code paths and key names as FLUX.1-Kontext. A
world gives the sizes, the words and the batches.
"""
