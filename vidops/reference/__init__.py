"""Plain PyTorch forms that read like the papers; the other backends are tested against them."""
