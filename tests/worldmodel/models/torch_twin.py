"""A plain torch implementation of the reference world model, written from its description."""

import torch
from torch import nn


class StateTwin(nn.Module):
    def __init__(self):
        super().__init__()
        self.static_embed = nn.Linear(3, 32)
        self.act_embed = nn.Linear(10, 32)
        self.gru = nn.GRU(39 + 38 + 64, 128, num_layers=2, batch_first=True, dropout=0.2)
        self.vent_head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))
        self.trans_pre = nn.Sequential(nn.Linear(129, 128), nn.ReLU(), nn.Dropout(0.2))
        self.mu_head = nn.Linear(128, 39)
        self.log_sigma_head = nn.Linear(128, 39)

    def forward(self, obs, mask, static, action):
        h = run_gru(self, obs, mask, static, action)
        vent = self.vent_head(h)
        t = self.trans_pre(torch.cat([h, torch.sigmoid(vent)], dim=-1))
        return self.mu_head(t), self.log_sigma_head(t), vent[:, 0]


class OutcomeTwin(nn.Module):
    def __init__(self):
        super().__init__()
        self.static_embed = nn.Linear(3, 32)
        self.act_embed = nn.Linear(10, 32)
        self.gru = nn.GRU(39 + 38 + 64, 128, num_layers=2, batch_first=True, dropout=0.2)
        self.outcome_head = nn.Sequential(
            nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1)
        )

    def forward(self, obs, mask, static, action):
        return self.outcome_head(run_gru(self, obs, mask, static, action))[:, 0]


def run_gru(model, obs, mask, static, action):
    steps = obs.shape[1]
    static = model.static_embed(static)[:, None].expand(-1, steps, -1)
    x = torch.cat([obs, mask, static, model.act_embed(action)], dim=-1)
    return model.gru(x)[0][:, -1]
