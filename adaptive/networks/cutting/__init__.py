"""Any timm model cut into blocks at its branch points, by recording forward passes.

1. ``recording`` runs the model, or its outline (``runs``), on two images and writes down what it does: a module that is
   not opened is one operation, an opened one is gone through operation by operation. With everything opened, this is
   the survey.
2. ``branch_points`` finds in the survey the modules behind which few tensors are needed later, and chooses among them.
3. ``cut`` records again, with only those modules opened that contain a branch point: once with two images, once with
   three, and once in training mode and double precision.
4. ``graphs`` compares the three recordings: a constant that differs depends on the batch size, on the mode or on the
   precision, and is written as such. Each stretch between two branch points becomes a torch.fx graph.
5. ``block`` makes a module of a graph: its code, and the model's own modules and parameters that the code names.

An example. This model, cut after ``first.conv``, in the middle of a residual unit,

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x).relu()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = Unit(), Unit(), nn.Linear(3, 10)

        def forward(self, images):
            x = self.second(self.first(images))
            return self.head(x.mean((2, 3)).view(len(x), -1))

becomes two blocks and a head with these methods (left out: what sets names to None as soon as they are used up):

    def forward(self, state_0):
        first_conv = self.first.conv(state_0)
        return (first_conv, state_0)

    def forward(self, state_0, state_1):
        relu = state_0.relu()
        add = state_1.add(relu)
        second = self.second(add)
        mean = second.mean((2, 3))
        size = state_0.size(0)
        view = mean.view(size, -1)
        return (view,)

    def forward(self, state_0):
        head = self.head(state_0)
        return head

``first`` is opened, for the cut lies inside, and its shortcut crosses the cut as a second tensor; the exit's own
feature comes first. ``second`` is not opened and stays one call. ``len(x)`` was 2 and 3 in the recordings: it depends
on the batch, and is read off a tensor that crosses. The last block ends where the model's last weights begin.
"""
