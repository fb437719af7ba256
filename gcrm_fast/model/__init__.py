"""The network: tensors in, tensors out; knows neither records nor tokenizers."""
