"""When each rank does what: schedules, lowering, validation, simulation, execution."""
