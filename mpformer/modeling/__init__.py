"""Model: backbone, pixel decoder, decoder, mask piloting, matcher and criterion."""
