"""What plans and placements are measured on."""
