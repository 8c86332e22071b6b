"""Slow estimators in plain NumPy float64, one stay and one step at a time."""

import numpy as np


class Reference:
    """One policy's estimates from ragged lists."""

    def __init__(self, data, probs, values=None, mrdr=None, marginal=None, gamma=1.0):
        self.gamma = gamma
        self.length = [int(n) for n in np.asarray(data.alive).sum(1)]
        self.steps = max(self.length)
        self.stays = len(self.length)
        self.r = np.asarray(data.reward, np.float64)
        action, b = np.asarray(data.action), np.asarray(data.behavior_probs, np.float64)
        taken = np.asarray(data.behavior_prob, np.float64)
        pi = np.asarray(probs, np.float64)
        self.rho = np.ones((self.stays, self.steps))
        self.rho_drug = np.ones((2, self.stays, self.steps))
        for i in range(self.stays):
            for t in range(self.length[i]):
                a = action[i, t]
                self.rho[i, t] = pi[i, t, a] / taken[i, t]
                p5, b5 = pi[i, t].reshape(5, 5), b[i, t].reshape(5, 5)
                self.rho_drug[0, i, t] = p5[a // 5].sum() / b5[a // 5].sum()
                self.rho_drug[1, i, t] = p5[:, a % 5].sum() / b5[:, a % 5].sum()
        self.w, self.w_drug = np.cumprod(self.rho, -1), np.cumprod(self.rho_drug, -1)
        self.values = None if values is None else [np.asarray(x, np.float64) for x in values]
        self.mrdr_values = None if mrdr is None else [np.asarray(x, np.float64) for x in mrdr]
        self.mu = None if marginal is None else np.asarray(marginal, np.float64)
        self.returns = np.array([self._sum(i, np.ones(self.steps)) for i in range(self.stays)])

    def _sum(self, i, weights):
        return sum(self.gamma**t * weights[t] * self.r[i, t] for t in range(self.length[i]))

    def on_policy(self):
        return self.returns.mean()

    def is_(self):
        return np.mean([self.w[i, -1] * self.returns[i] for i in range(self.stays)])

    def wis(self):
        return (self.w[:, -1] * self.returns).sum() / self.w[:, -1].sum()

    def pdis(self):
        return np.mean([self._sum(i, self.w[i]) for i in range(self.stays)])

    def _wpdis(self, counted):
        total = 0.0
        for t in range(self.steps):
            present = [i for i in range(self.stays) if counted(i, t)]
            numerator = sum(self.w[i, t] * self.r[i, t] for i in present if t < self.length[i])
            total += self.gamma**t * numerator / sum(self.w[i, t] for i in present)
        return total

    def wpdis(self):
        return self._wpdis(lambda i, t: True)

    def wpdis_alive(self):
        return self._wpdis(lambda i, t: t < self.length[i])

    def dm(self):
        return self.values[1][:, 0].mean()

    def _doubly_robust(self, weight, values):
        q, v = values
        total = 0.0
        for i in range(self.stays):
            before = 1.0
            for t in range(self.length[i]):
                total += self.gamma**t * (
                    weight[i, t] * (self.r[i, t] - q[i, t]) + before * v[i, t]
                )
                before = weight[i, t]
        return total / self.stays

    def dr(self):
        return self._doubly_robust(self.w, self.values)

    def mrdr(self):
        return self._doubly_robust(self.w, self.mrdr_values)

    def drl(self):
        return self._doubly_robust(self.mu, self.values)

    def switch(self, bound=10.0):
        return self._temporal(np.where(self.w <= bound, self.w, 0.0))

    def dr_os(self, rate=100.0):
        return self._temporal(rate * self.w / (self.w**2 + rate))

    def dr_sg(self, rate=0.05):
        return self._temporal(self.w / (1 - rate + rate * self.w))

    def _temporal(self, weight):
        return sum(self._stay(i, weight) for i in range(self.stays)) / self.stays

    def _stay(self, i, weight, last=None):
        q, v = self.values
        total = v[i, 0]
        for t in range(self.length[i] if last is None else min(self.length[i], last)):
            after = v[i, t + 1] if t + 1 < self.length[i] else 0.0
            total += self.gamma**t * weight[i, t] * (self.r[i, t] - q[i, t] + self.gamma * after)
        return total

    def wdr(self):
        q, v = self.values
        total = 0.0
        for t in range(self.steps):
            now = self.w[:, t] / self.w[:, t].sum()
            before = (
                np.full(self.stays, 1 / self.stays)
                if t == 0
                else self.w[:, t - 1] / self.w[:, t - 1].sum()
            )
            for i in range(self.stays):
                if t < self.length[i]:
                    total += self.gamma**t * (
                        now[i] * (self.r[i, t] - q[i, t]) + before[i] * v[i, t]
                    )
        return total

    def j_step(self, last):
        """WDR up to step `last` (-1 for none), then the fitted value of what is left."""
        q, v = self.values
        total = v[:, 0].mean()
        for t in range(last + 1):
            now = self.w[:, t] / self.w[:, t].sum()
            for i in range(self.stays):
                if t < self.length[i]:
                    after = v[i, t + 1] if t + 1 < self.length[i] else 0.0
                    total += self.gamma**t * now[i] * (self.r[i, t] - q[i, t] + self.gamma * after)
        return total

    def factored_is(self):
        joint = self.w_drug.prod(0)
        return np.mean([self._sum(i, joint[i]) for i in range(self.stays)])

    def decomposed_is(self):
        halves = self.w_drug.mean(0)
        return np.mean([self._sum(i, halves[i]) for i in range(self.stays)])

    def mis(self):
        return np.mean([self._sum(i, self.mu[i]) for i in range(self.stays)])

    def tail(self, level):
        """Quantile and lower CVaR of the self-normalised distribution of the return."""
        order = np.argsort(self.returns, kind="stable")
        weight = self.w[order, -1] / self.w[:, -1].sum()
        left, total = level, 0.0
        for value, mass in zip(self.returns[order], weight, strict=True):
            used = min(mass, left)
            total, left = total + used * value, left - used
            if left <= 0:
                return value, total / level
        return self.returns[order][-1], total / level
