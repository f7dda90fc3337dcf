# A module evaluator: options with types, definitions with priorities, imports, and errors that name the option
# and the files, in the words that NixOS uses for them.
{ lib }:

let
  inherit (builtins)
    attrNames
    concatMap
    elem
    elemAt
    filter
    foldl'
    functionArgs
    genericClosure
    head
    isAttrs
    isFunction
    isPath
    isString
    length
    listToAttrs
    map
    mapAttrs
    removeAttrs
    sort
    toJSON
    toString
    tryEval
    typeOf
    ;

  # -- what a definition can be wrapped in
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkForce = mkOverride 50;
  defaultPriority = 100;
  mkDefault = mkOverride 1000;
  mkOptionDefault = mkOverride 1500;
  mkOrder = priority: content: {
    _type = "order";
    inherit priority content;
  };
  mkBefore = mkOrder 500;
  defaultOrder = 1000;
  mkAfter = mkOrder 1500;

  # -- options
  mkOption = attrs: attrs // { _type = "option"; };
  mkEnableOption =
    what:
    mkOption {
      type = lib.types.bool;
      default = false;
      description = "Whether to enable ${what}.";
    };
  mkPackageOption =
    pkgs: name: _:
    mkOption {
      type = lib.types.package;
      default = pkgs.${name};
    };
  isOption = value: isAttrs value && value._type or null == "option";

  hasType = type: value: isAttrs value && value._type or null == type;

  showOption =
    path:
    lib.concatStringsSep "." (
      map (part: if builtins.match "[A-Za-z_<*][A-Za-z0-9_'>*-]*" part != null then part else toJSON part) path
    );

  showValue =
    value:
    let
      text = tryEval (
        if isFunction value then
          "<function>"
        else if lib.isDerivation value then
          "<derivation ${value.name}>"
        else
          toJSON (plain value)
      );
      # Derivations and functions inside a value would be built or would fail to print.
      plain =
        v:
        if isFunction v then
          "<function>"
        else if lib.isDerivation v then
          "<derivation ${v.name}>"
        else if isPath v then
          toString v
        else if isAttrs v then
          mapAttrs (_: plain) v
        else if builtins.isList v then
          map plain v
        else
          v;
    in
    if text.success then text.value else "<error>";

  showDefs = defs: lib.concatStrings (map (d: "\n- In `${d.file}': ${showValue d.value}") defs);

  # -- wrappers taken off
  #
  # `pushDown` moves them from a whole configuration into its attributes without looking at a condition, since the
  # condition may depend on the configuration.
  pushDown =
    value:
    if hasType "merge" value then
      concatMap pushDown value.contents
    else if hasType "if" value then
      map (mapAttrs (_: mkIf value.condition)) (pushDown value.content)
    else if hasType "override" value then
      map (mapAttrs (_: mkOverride value.priority)) (pushDown value.content)
    else
      [ value ];

  # `dischargeProperties` looks at the conditions of one option's definition; overrides and orders stay.
  dischargeProperties =
    value:
    if hasType "merge" value then
      concatMap dischargeProperties value.contents
    else if hasType "if" value then
      if !(builtins.isBool value.condition) then
        throw "mkIf called with a condition that is no Boolean: ${showValue value.condition}"
      else if value.condition then
        dischargeProperties value.content
      else
        [ ]
    else if hasType "override" value || hasType "order" value then
      map (content: value // { inherit content; }) (dischargeProperties value.content)
    else
      [ value ];

  strongest =
    defs:
    let
      priority = d: if hasType "override" d.value then d.value.priority else defaultPriority;
      best = foldl' (p: d: lib.min p (priority d)) 9999 defs;
      unwrap = d: if hasType "override" d.value then d // { value = d.value.content; } else d;
    in
    {
      values = map unwrap (filter (d: priority d == best) defs);
      inherit best;
    };

  ordered =
    defs:
    let
      order = d: if hasType "order" d.value then d.value.priority else defaultOrder;
      unwrap = d: if hasType "order" d.value then d // { value = d.value.content; } else d;
    in
    if lib.any (d: hasType "order" d.value) defs then
      map unwrap (sort (a: b: order a < order b) defs)
    else
      defs;

  # The definitions `[ { file; value; } ]` of one place, merged by `type`.
  mergeDefinitions =
    path: type: defs:
    let
      discharged = concatMap (d: map (value: { inherit (d) file; inherit value; }) (dischargeProperties d.value)) defs;
      inherit (strongest discharged) best;
      values = ordered (strongest discharged).values;
      bad = filter (d: !type.check d.value) values;
      isDefined = values != [ ];
    in
    {
      inherit isDefined best values;
      mergedValue =
        if !isDefined then
          throw "The option `${showOption path}' is used but not defined."
        else if bad != [ ] then
          throw "A definition for option `${showOption path}' is not of type `${type.description}'. Definition values:${showDefs bad}"
        else
          type.merge path values;
    };

  # -- modules
  #
  # A module is a path, a function or a set. Loaded, it is { file; key; imports; options; config; freeformType; }.
  load =
    args: file: key: module:
    if isPath module || isString module then
      load args (toString module) (toString module) (import module)
    else if isFunction module then
      load args file key (module (namedArgs args module))
    else if !isAttrs module then
      throw "The module in `${file}' is no path, function or set but a ${typeOf module}."
    else
      let
        own = module._file or file;
        full = module ? config || module ? options;
        known = [
          "_file"
          "key"
          "imports"
          "options"
          "config"
          "freeformType"
          "meta"
          "disabledModules"
        ];
        unknown = removeAttrs module known;
      in
      if full && unknown != { } then
        throw "Module `${own}' has an unsupported attribute `${head (attrNames unknown)}'. This is caused by introducing a top-level `config' or `options' attribute. Add configuration attributes immediately on the top level instead, or move all of them into the explicit `config' attribute."
      else
        {
          file = own;
          key = module.key or key;
          imports = module.imports or [ ];
          options = module.options or { };
          config =
            if full then
              module.config or { }
            else
              removeAttrs module [
                "_file"
                "key"
                "imports"
                "freeformType"
                "meta"
                "disabledModules"
              ];
          freeformType = module.freeformType or null;
        };

  # As in NixOS: an argument that no special argument gives comes lazily from `_module.args`.
  namedArgs =
    args: f:
    args.special
    // mapAttrs (
      name: _:
      args.special.${name} or args.config._module.args.${name}
        or (throw "the module argument `${name}' is not known")
    ) (lib.filterAttrs (name: optional: !optional || args.special ? ${name}) (functionArgs f));

  # Every module once, by its key: a file that two modules import counts once.
  collect =
    args: modules:
    let
      # What has no file of its own is known by its place in the module that imports it.
      item = parent: n: module: load args parent.file "${parent.key}:anon-${toString n}" module;
      outside = {
        file = "<unknown-file>";
        key = "";
      };
      node = m: {
        key = m.key;
        module = m;
      };
      children = m: lib.imap1 (n: sub: node (item m n sub)) m.imports;
    in
    map (n: n.module) (genericClosure {
      startSet = lib.imap1 (n: m: node (item outside n m)) modules;
      operator = n: children n.module;
    });

  # -- declarations and definitions, level by level
  #
  # `decls` is [ { file; options; } ], `defs` is [ { file; value; } ]. Gives the values of what is declared, and
  # the definitions of what is not.
  mergeLevel =
    path: decls: defs:
    let
      names = lib.unique (concatMap (d: attrNames d.options) decls);
      flat = concatMap (
        d:
        map (value: {
          inherit (d) file;
          value =
            if isAttrs value then
              value
            else
              throw "The option `${showOption path}' is a set of options, but in `${d.file}' it is given a ${typeOf value}.";
        }) (pushDown d.value)
      ) defs;
      defsOf =
        name:
        map (d: {
          inherit (d) file;
          value = d.value.${name};
        }) (filter (d: d.value ? ${name}) flat);
      level =
        name:
        let
          here = path ++ [ name ];
          mine = filter (d: d.options ? ${name}) decls;
          options = filter (d: isOption d.options.${name}) mine;
        in
        if options == [ ] then
          mergeLevel here (map (d: {
            inherit (d) file;
            options = d.options.${name};
          }) mine) (defsOf name)
        else if length mine > 1 then
          throw "The option `${showOption here}' in `${(elemAt mine 1).file}' is already declared in `${(head mine).file}'."
        else
          {
            value = optionValue here (head options).file (head options).options.${name} (defsOf name);
            unmatched = [ ];
          };
      levels = listToAttrs (map (name: lib.nameValuePair name (level name)) names);
    in
    {
      value = mapAttrs (_: l: l.value) levels;
      unmatched =
        concatMap (
          d:
          map (name: {
            inherit (d) file;
            path = path ++ [ name ];
            value = d.value.${name};
          }) (filter (name: !elem name names) (attrNames d.value))
        ) flat
        ++ concatMap (name: levels.${name}.unmatched) names;
    };

  optionValue =
    path: file: option: defs:
    let
      type = option.type or lib.types.unspecified;
      withDefault =
        lib.optional (option ? default) {
          inherit file;
          value = mkOptionDefault option.default;
        }
        ++ defs;
      merged = mergeDefinitions path type withDefault;
      value =
        if option.readOnly or false && length defs > 1 then
          throw "The option `${showOption path}' is read-only, but it's set multiple times. Definition values:${showDefs merged.values}"
        else
          merged.mergedValue;
    in
    # A type that holds nothing when nothing is defined says so itself (`listOf`, `attrsOf`, `submodule`).
    if !merged.isDefined && type ? emptyValue then
      (option.apply or lib.id) type.emptyValue
    else
      (option.apply or lib.id) value;

  # :param modules: paths, functions or sets
  # :param specialArgs: what every module function gets beside `config`, `lib` and `_module.args`
  # :param prefix: the path of a submodule, for its errors
  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      internal = {
        _file = "lib/modules.nix";
        key = "lib/modules.nix";
        options._module.args = mkOption {
          type = lib.types.lazyAttrsOf lib.types.raw;
          default = { };
        };
      };
      args = {
        inherit config;
        special = {
          inherit lib config;
        }
        // specialArgs;
      };
      all = collect args (modules ++ [ internal ]);
      merged = mergeLevel prefix (map (m: { inherit (m) file options; }) all) (
        map (m: {
          inherit (m) file;
          value = m.config;
        }) all
      );
      freeform = filter (t: t != null) (map (m: m.freeformType) all);
      free = mergeDefinitions prefix (head freeform) (
        map (d: {
          inherit (d) file;
          value = lib.setAttrByPath (lib.drop (length prefix) d.path) d.value;
        }) merged.unmatched
      );
      config =
        if freeform == [ ] || merged.unmatched == [ ] then
          merged.value
        else
          lib.recursiveUpdate free.mergedValue merged.value;
      first = head merged.unmatched;
      of = filter (d: d.path == first.path) merged.unmatched;
      checked =
        if freeform == [ ] && merged.unmatched != [ ] then
          throw "The option `${showOption first.path}' does not exist. Definition values:${showDefs of}"
        else
          config;
    in
    {
      config = removeAttrs checked [ "_module" ];
    };
in
{
  inherit
    dischargeProperties
    evalModules
    mergeDefinitions
    mkAfter
    mkBefore
    mkDefault
    mkEnableOption
    mkForce
    mkIf
    mkMerge
    mkOption
    mkOptionDefault
    mkOrder
    mkOverride
    mkPackageOption
    showDefs
    showOption
    ;
}
