"""Fine-tuning recipes for pretrained vision backbones."""
