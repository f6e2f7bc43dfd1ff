"""Inside a rank: model, parallel engines, data, checkpoint, objectives, the loop."""
