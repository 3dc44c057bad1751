"""What server and farms must agree on: models, masks, mathematics, coding and messages."""
