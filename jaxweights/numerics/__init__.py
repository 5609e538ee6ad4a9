"""Mathematics that two techniques or more stand on."""
