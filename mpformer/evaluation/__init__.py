"""From a trained model to scores and layer tables."""
