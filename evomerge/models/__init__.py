"""Models: folders of safetensors in, a stream of merged tensors through, folders of safetensors out."""
